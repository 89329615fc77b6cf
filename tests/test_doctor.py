"""The doctor: what it measures, and what it advises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

import mlx_hiermem
from mlx_hiermem import backend, cli, models
from mlx_hiermem.commands import disk_speed, doctor
from mlx_hiermem.errors import InputError

CPU = {"backend": "cpu", "memory": {}}
FAST = {"library": "OpenBLAS", "gflops": 200.0, "remedy": None}
DISK = {"folder": "here", "free": 1e12, "bytes_per_second": 2e9}


def test_doctor_as_json(tmp_path):
    output = subprocess.run(
        [sys.executable, "-m", "mlx_hiermem", "doctor", "--json", "--folder", str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    report = json.loads(output)
    assert set(report) == {"device", "blas", "disk", "versions", "models", "advice"}
    assert report["disk"]["free"] > 0 and report["disk"]["folder"] == str(tmp_path)
    assert report["device"]["backend"] in ("metal", "cuda", "cpu")
    assert report["device"]["gflops"] > 0
    assert report["device"]["memory"]["system"] > 2**28
    assert report["versions"]["mlx_hiermem"] == mlx_hiermem.__version__
    assert set(doctor.PACKAGES) < set(report["versions"])
    assert report["blas"]["gflops"] > 0
    slow = report["blas"]["library"] == "of the MLX wheel"
    assert (report["blas"]["remedy"] is not None) == slow


def test_doctor_as_text(capsys, tmp_path):
    assert cli.main(["doctor", "--folder", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for word in ("backend", "GFLOP/s", "memory", "disk", "mlx-lm", mlx_hiermem.__version__):
        assert word in text


def test_doctor_says_how_to_mend_a_slow_matmul(monkeypatch, tmp_path):
    slow = {"library": "of the MLX wheel", "gflops": 4.4, "remedy": backend.REMEDY}
    monkeypatch.setattr(doctor, "blas_facts", lambda: slow)
    monkeypatch.setattr(
        doctor, "device_facts", lambda: {"backend": "cpu", "memory": {}, "device": "x"}
    )
    advice = doctor.diagnose(tmp_path)["advice"]
    assert any("4.4 GFLOP/s" in line and "libopenblas0-pthread" in line for line in advice)


def test_shipped_models_are_found_with_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_ASSETS", tmp_path)
    assert doctor.model_sizes() == {}
    folder = tmp_path / "atlas" / "memory"
    folder.mkdir(parents=True)
    (tmp_path / "atlas" / "config.json").write_bytes(b"12345")
    (folder / "generic.safetensors").write_bytes(b"123")
    assert doctor.model_sizes() == {"atlas": 8}


# ---- the disk --------------------------------------------------------------------------


def test_the_disk_is_read_and_left_as_it_was(tmp_path, monkeypatch):
    read, order = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: order.append(at) or read(fd, to, at))
    assert disk_speed.read_speed(tmp_path) > 1e6
    assert sorted(order) == [i * disk_speed.PIECE for i in range(disk_speed.PIECES)] != order
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))
    assert disk_speed.read_speed(tmp_path) is None
    assert "disk" in doctor.to_text(doctor.diagnose(tmp_path))


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert cli.main(["doctor", "--folder", str(tmp_path / "none")]) == 2
    assert "none: no such folder; name one on the disk" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk_speed.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        disk_speed.read_speed(tmp_path)


# ---- advice ----------------------------------------------------------------------------


def test_a_machine_in_good_order_gets_no_advice(monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(doctor, "idle_gpu", lambda: False)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert doctor._about_speed(CPU, FAST) == []
    assert doctor._about_room({"memory": {"system_free": 2**34}}, DISK) == []
    assert doctor._about_room({"memory": {}}, {**DISK, "bytes_per_second": None}) == []
    assert doctor._about_parts({"atlas": 1}) == []


def test_advice_says_what_would_be_faster_and_how(monkeypatch):
    monkeypatch.setattr(doctor, "idle_gpu", lambda: True)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    gpu, mac, threads = doctor._about_speed(CPU, FAST)
    assert "mlx-cuda-13" in gpu and "arm64" in mac and "OPENBLAS_NUM_THREADS=2" in threads
    disk, memory = doctor._about_room(
        {"memory": {"system_free": 2**30}}, {**DISK, "bytes_per_second": 1e8}
    )
    assert "100 MB/s" in disk and "takes 361 ms" in disk and "bank quantize" in disk
    assert "1.0 GiB" in memory and "--memory-budget" in memory


def test_a_checkout_that_is_not_installed_asks_for_nothing(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert doctor.too_old() == []


def test_packages_that_are_too_old(monkeypatch):
    wanted = ["numpy>=99", "mlx-lm>=0.1", "nowhere>=1", "gradio>=99; extra == 'x'", "?"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    assert doctor.too_old() == [("numpy", metadata.version("numpy"), ">=99")]
    line, *_ = doctor._about_parts({"atlas": 1})
    assert "is older than this package wants (>=99)" in line and "pip install -U" in line
