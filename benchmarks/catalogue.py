"""All benchmarks and studies: what each is about, and what the paper says of the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One script.

    Attributes:
        name: module below this folder, such as "fetch" or "studies.levels".
        title: what it measures.
        paper: which figure or table of the paper it is the counterpart of; "" for none.
        says: what the paper says, in our words and with its figures.
        remark: what to bear in mind with our result; without figures, which a run may change.
        arguments: for a run whose figures count, besides those that all have.
        figure: whether it draws one (``--png``).
        keeps: whether it takes ``--work``, where parts and results of training runs are kept.
    """

    name: str
    title: str
    paper: str = ""
    says: str = ""
    remark: str = ""
    arguments: tuple[str, ...] = ()
    figure: bool = True
    keeps: bool = False

    @property
    def short(self) -> str:
        """The name without the folder."""
        return self.name.rsplit(".", 1)[-1]


def _study(name: str, title: str, paper: str = "", says: str = "", **more) -> Entry:
    return Entry(f"studies.{name}", title, paper, says, **more)


def _training(name: str, title: str, paper: str = "", says: str = "", **more) -> Entry:
    return _study(name, title, paper, says, keeps=True, **more)


#: What is measured as a ratio of times or bytes, side by side in one run.
SPEED = (
    Entry("fetch", "Fetching a path", "section 5, loading",
          "On a hypothetical machine: hierarchical 38 ms, a flat bank of the same fetch size "
          "198 ms; after a topic change 47 ms against 198 ms.",
          remark="Flash and external are made: reads from memory that are held back to the speed "
          "of such a medium (bank.md)."),
    Entry("route", "Finding a path", figure=False),
    Entry("decode", "Decoding with a memory, and changing it", figure=False),
    Entry("ffn_forms", "A branch, or wider matrices", figure=False),
    Entry("train_step", "A training step", "section 3",
          "Training the 160M anchor with its bank takes under 1.7 times the compute of the anchor.",
          figure=False),
    Entry("convert", "Converting a bank", figure=False),
    Entry("quantize", "Quantised banks", figure=False),
    Entry("serve", "Serving requests with different memories", arguments=("--soak", "1000"),
          figure=False),
)  # fmt: skip

#: What the paper shows, and what it left open, on the atlas.
STUDIES = (
    _study("frequency", "Accuracy by how often a fact was trained", "figure 1",
           "Rarest bucket of the atomic numbers, 1.4B: 17 % without, 83 % with fetched memory.",
           remark="The rarer buckets hardly differ in how often their facts are in the corpus; "
           "there generic memory is near the floor and fetched memory near the ceiling."),
    _training("kinds", "Kinds of memory", "figure 3a",
              "FFN memories are the best of five kinds at every size.",
              remark="The learning rate of each kind is the best of three at the smallest size; at "
              "the larger ones another may be better (kinds.md)."),
    _training("levels", "Levels of the tree", "figure 3b",
              "At one fetch size deeper levels are better."),
    _training("sizes", "Sizes of a fetch", "figures 3c and 3d", "A bigger fetch is better.",
              remark="All sizes have the same steps and learning rate. With twice the steps the "
              "largest but one is level with the one before it (see tokens for each parameter of "
              "the bank); the largest was not tried with more."),
    _training("bank_sizes", "Fetch against bank", "figure 4a",
              "A bigger fetch and a bigger bank are each strictly better."),
    _training("shares", "Memory against anchor at one size at run time", "figure 4b",
              "A fetched memory of about a tenth of the anchor is best.",
              remark="The claim counts as met from 5 to 20 %; the ranges of the two best shares "
              "overlap."),
    _training("learning", "Learning curves, frozen and co-trained", "figure 6a",
              "Co-training is ahead of memories on a frozen anchor."),
    _study("blocking", "Blocking parts of the bank", "figure 6b",
           "Blocking the best-matching 1/16 of the bank: 70 % to 20 %."),
    _training("regimes", "Regimes of training", "table 1",
              "SK, generic to fetched: co-trained 35.7 to 40.3, frozen 34.7 to 39.2, from scratch "
              "33.8 to 39.6; without memory 34.1.",
              remark="So few steps leave the rarest facts near zero in every regime, so there the "
              "order of the regimes may be chance; and the memories of A4 have twice the steps of "
              "the others. What is fetched is ahead of generic memory in each."),
    _study("rag", "Against retrieval", "table 3",
           "At equal retrieval RAG costs 1.7 to 2.3 times the FLOPs, memory 1.1 times, and memory "
           "scores higher.",
           remark="An anchor as small as the atlas's cannot use a document in its context, not "
           "even the right one (oracle). So the accuracy here says nothing about retrieval with "
           "models that can; what it costs does not depend on that."),
    _training("tokens", "Tokens for each parameter of the bank", "figure 7"),
    _training("placement", "Layers with memory", "table 9",
              "Uniform and late are equally good; late is best on atomic numbers, early worst."),
    _study("wrong_path", "What a wrong path costs"),
    _training("agreement", "Do questions arrive where their facts were trained",
              remark="Both weigh, the encoder and what of a document is routed; where more than "
              "half of the questions go astray, memory is worse than none. The paper's encoder is "
              "not among these, as its weights were not at hand: `--bert MODEL` adds it."),
    _study("prompts", "Prompts that are shortened or misspelt"),
    _study("beams", "Two nearest leaves instead of one"),
    Entry("refetch", "A topic that changes in mid-conversation"),
    _training("shapes", "Other trees",
              remark="At one fetch size, accuracy mostly goes with the size of the bank; but the "
              "deepest tree of four children is no better than flatter ones with smaller banks. "
              "Nearly all questions land in each."),
    _study("anchor", "A bank moved to another anchor",
           remark="A bank belongs to the anchor that it was trained with: to another of the same "
           "shape, trained on the same corpus without memory, it does harm."),
    _study("add_knowledge", "Adding knowledge, against LoRA",
           remark="The adapters saw nothing but the new documents; what they would keep if old "
           "ones were mixed in was not measured."),
    _study("leakage", "What is left of removed knowledge",
           remark="Along the path, what the removed blocks knew is gone, down to what the anchor "
           "and the blocks above know; some sibling may know more. These were trained on "
           "the topic too, and most know more than a model that never saw it."),
)  # fmt: skip

ALL = (*SPEED, *STUDIES)


def find(name: str) -> Entry | None:
    """The entry of this name, with or without its folder."""
    return next((one for one in ALL if name in (one.name, one.short)), None)
