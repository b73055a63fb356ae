"""Faults from inside a rank, where its run directory has a chaos.json: no hook stands in the code that is tested.

Python imports this module in every process that finds this folder on its path; all but ranks leave it at once. In a rank it
wraps the forward step and the reading of batches as their modules are imported. Each injection names a rank (null: all) and
samples [first, end) of the stage; `once` is at most one micro batch. What was done is told in chaos_done.jsonl.

`nan`, `scale` (with `factor`) and `shift` (by `by`) change the loss of a micro batch, `flip` a bit of a weight, `delay` sleeps
`seconds` in the forward pass, `stall` as long in reading a batch that is waited for.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

NAMES = ("training.step", "training.data")


class Chaos:
    """Of one rank. `sample` is the first of the batch that is trained on now, None while it is not training; `done` are those
    that were made, also before the rank was started again."""

    def __init__(self, run_dir):
        self.orders, self.told = run_dir / "chaos.json", run_dir / "chaos_done.jsonl"
        self.rank, self.sample = int(os.environ["RANK"]), None
        lines = self.told.read_text().splitlines() if self.told.exists() else []
        self.done = {json.loads(line)["id"] for line in lines}

    def due(self, *kinds, sample):
        """Injections to be made now."""
        if sample is None or not self.orders.exists():
            return []
        rows = [row for row in json.loads(self.orders.read_text()) if row["kind"] in kinds]
        rows = [row for row in rows if row["rank"] in (None, self.rank) and row["first"] <= sample < row["end"]]
        rows = [row for row in rows if not (row["once"] and row["id"] in self.done)]
        for row in rows:
            self.tell(row["id"], sample=sample)
        return rows

    def tell(self, name, *, sample):
        """Once."""
        if name not in self.done:
            self.done.add(name)
            line = json.dumps({"id": name, "time": time.time(), "rank": self.rank, "sample": sample})
            with self.told.open("a") as file:
                file.write(line + "\n")


def wrap_step(module, chaos):
    """What goes into the model and comes out of it, in training alone."""
    forward_step = module.forward_step

    def broken(iterator, model, *more, **settings):
        rows = chaos.due("nan", "scale", "shift", "flip", "delay", sample=chaos.sample)
        for row in rows:
            if row["kind"] == "flip":
                flip_bit(model, place=row["place"], bit=row["bit"])
        slow = sum(row["seconds"] for row in rows if row["kind"] == "delay")
        output, loss = forward_step(iterator, late(model, seconds=slow) if slow else model, *more, **settings)
        for row in rows:
            output = output * float("nan") if row["kind"] == "nan" else output
            output = output * row["factor"] if row["kind"] == "scale" else output
            output = output + row["by"] if row["kind"] == "shift" else output
        return output, loss

    module.forward_step = broken


def late(model, *, seconds):
    """A model that takes longer."""

    def call(*inputs, **named):
        time.sleep(seconds)
        return model(*inputs, **named)

    return call


def flip_bit(model, *, place, bit):
    """Of one weight, at a part `place` in [0, 1) of all of them."""
    import torch

    weights = [weight.data.view(-1) for weight in model.parameters()]
    at = int(place * sum(len(weight) for weight in weights))
    for weight in weights:
        if at < len(weight):
            weight.view(torch.int32)[at] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            return
        at -= len(weight)


def wrap_data(module, chaos):
    batch, read, held_out = module.TrainingFeed.batch, module.TrainingFeed._read, module.HeldOutFeed.batches

    def training(feed, first_sample):
        chaos.sample = first_sample
        return batch(feed, first_sample)

    def reading(feed, first_sample):
        for row in chaos.due("stall", sample=first_sample):
            while chaos.sample is None or chaos.sample < first_sample:  # it is read ahead, and not waited for yet
                time.sleep(0.01)
            time.sleep(row["seconds"])
        return read(feed, first_sample)

    def evaluating(feed):
        chaos.sample = None
        return held_out(feed)

    module.TrainingFeed.batch, module.TrainingFeed._read, module.HeldOutFeed.batches = training, reading, evaluating


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Has the modules of NAMES loaded as they are, and then wrapped."""

    def __init__(self, chaos):
        self.chaos, self.loaders = chaos, {}

    def find_spec(self, name, path=None, target=None):
        if name not in NAMES or name in self.loaders:
            return None
        self.loaders[name] = None  # the others are asked
        spec = importlib.util.find_spec(name)
        self.loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        self.loaders[module.__name__].exec_module(module)
        (wrap_step if module.__name__ == "training.step" else wrap_data)(module, self.chaos)


def run_directory(words):
    """Of a rank, from its command line; None of any other process."""
    for flag, name, folder in zip(words, words[1:], words[2:], strict=False):
        if (flag, name) == ("-m", "training") and "RANK" in os.environ:
            return Path(folder)
    return None


if __name__ == "sitecustomize" and (found := run_directory(sys.orig_argv)):
    sys.meta_path.insert(0, Finder(Chaos(found)))
