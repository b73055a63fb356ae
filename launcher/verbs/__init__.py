"""The verbs of `phidias`, one module each, imported when the verb is named. A config verb has OPTIONS and `act(request)`,
a run verb `run(words)`; both return the exit code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """`composes`: a config verb, which is a Hydra app; the others take run names and read what is frozen there."""

    usage: str
    help: str
    composes: bool


VERBS = {
    "plan": Verb("[overrides] [out=json] [picture=FILE]", "what each stage comes to: memory, speed, days and cost", True),
    "exposure": Verb("[overrides] [out=json]", "how often each source is read over the run", True),
    "data": Verb("[overrides] [dry=true] [action=verify|import]", "turn raw text into shards, or verify them", True),
    "train": Verb("[overrides]", "train the stages of a run on this machine; goes on where it stopped", True),
    "rehearse": Verb(
        "[overrides] [rank=0] [steps=5] [data=real] [profile=true] [out=json]",
        "one rank of the job alone on this machine's GPU: time and memory beside the plan",
        True,
    ),
    "calibrate": Verb("[run ...] [rows=TABLE.csv] out=FOLDER [name=site]", "fit the planner to measured runs", False),
    "submit": Verb("[overrides] [dry=true] [concurrency=N]", "queue a run on a Slurm cluster; goes on where it stopped", True),
    "resume": Verb("<run>", "go on with a run as it is frozen, on its cluster or on this machine", False),
    "watch": Verb("<run> [every=5] [wait=true]", "a live view of a run, from another terminal or machine", False),
    "logs": Verb("<run> [stage=X] [lines=40]", "the end of what a run has said", False),
    "stop": Verb("<run> [now=true]", "have a run save and end, and cancel what of it waits", False),
    "job": Verb("[overrides]", "inside a Slurm job: what slurm/pretrain.sh runs", False),
    "checkpoint": Verb("<run> [action=list|verify|prune]", "which checkpoints a run has, whether they are whole; fewer", False),
    "export": Verb("<run> [stage=X] [prompt=TEXT]", "write a Hugging Face checkpoint", False),
    "eval": Verb("<run> [stage=X]", "held-out loss of an exported checkpoint, by source", False),
    "report": Verb("<run>", "write report.html of a run", False),
    "compare": Verb("<run ...> [out=json|PAGE.html]", "held-out loss of runs at equal tokens, and a better mixture", False),
    "sync": Verb("<run ...>", "upload what a run logged to W&B without a network", False),
    "dashboard": Verb("<run> | project=NAME [out=json]", "a W&B workspace and report with the panels that matter", False),
    "status": Verb("[run ...] [out=json]", "where runs stand", False),
}
