"""``mlx_hiermem demo``: the page in the browser, served by this machine for itself."""

from __future__ import annotations

import argparse
import socket
from functools import partial
from pathlib import Path

from ..errors import InputError
from .options import add_model_arguments, load_model, private_folders, public_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but the default lets others in (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=7860,
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--run",
        dest="run_folder",  # args.run is the subcommand's function
        metavar="FOLDER",
        help="a training run, whose learning curves are shown live",
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address and open no browser"
    )


def run(args: argparse.Namespace) -> int:
    from ..apps.demo.worker import ModelThread
    from ..bank.parts import Part
    from ..bank.reader import BlockReader

    run_folder = None if args.run_folder is None else Path(args.run_folder).expanduser()
    if run_folder is not None:
        from ..apps.demo.training_tab import check_run

        check_run(run_folder)  # before the seconds that the model takes
    port = free_port(args.host, args.port)
    thread = ModelThread(partial(load_model, args), private_folders(args))
    facts = thread.start()
    try:
        from ..apps.demo.app import Demo, serve  # imports Gradio: seconds

        folders = {level: Path(where).expanduser() for level, where in args.level_folder}
        part = Part.of(args.levels, args.subtrees)
        reader = partial(BlockReader, facts.folder, folders, part)
        demo = Demo(thread, facts, public_name(args), reader, run_folder)
        serve(demo, args.host, port, not args.no_browser)
    finally:
        thread.close()
    return 0


def free_port(host: str, port: int) -> int:
    """``port``, or a free one for 0, once it is sure that it can be listened on.

    Raises:
        InputError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            # As servers do: a port that a server has just left may be taken again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{host}, port {port}: cannot be listened on ({reason}); give another --port "
            "(0 takes a free one) or --host"
        ) from None
