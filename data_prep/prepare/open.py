"""Opening a source: it is whole, or begun by the same settings, or planned now; anything else in its folder is left alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import DataError
from data_prep.inputs import InputFile, find_inputs
from data_prep.manifest import Manifest, damaged_shards, imported_manifest, read_manifest
from data_prep.prepare.finish import MANIFEST, tidy
from data_prep.prepare.job import Job, shared_tokenizer
from data_prep.prepare.place import FAILED, STALE_S, LocalPlace, Place, open_place
from data_prep.prepare.plan import FILE, Plan, Settings, changed_inputs, decode_plan, differences, plan_source, settings_of
from data_prep.prepare.receipt import FOLDER, finished_tasks, is_valid, read_receipt
from data_prep.spec import DataSettings, Source, TokenizerSpec
from data_prep.storage import open_folder


class Order(NamedTuple):
    """What to prepare, how, and where; `token` names the call. Worker processes are told this much."""

    sources: Mapping[str, Source]
    tokenizer: TokenizerSpec
    settings: DataSettings
    seed: int
    data_dir: str
    token: str

    def job(self, plan: Plan, *, place: Place) -> Job:
        return Job(self.sources[plan.source], plan, place, self.tokenizer, self.settings, self.seed)


def is_imported(data_dir: str | Path, name: str) -> bool:
    """Whether the source was taken over from Megatron: it has no text to be made from."""
    return "://" not in str(data_dir) and imported_manifest(Path(data_dir) / name) is not None


def open_source(order: Order, name: str) -> Job | Manifest:
    """The manifest of a source that is whole; else the job that makes it. DataError: other settings made what is there."""
    _check_buckets(order.settings.length_buckets)
    tokenizer = shared_tokenizer(order.tokenizer)
    if is_imported(order.data_dir, name):
        manifest = read_manifest(Path(order.data_dir) / name)
        _refuse_other(
            differences({"tokenizer": manifest.tokenizer.fingerprint}, {"tokenizer": tokenizer.fingerprint}), place=name
        )
        return manifest
    place = open_place(order.data_dir, name)
    source = order.sources[name]
    files = find_inputs(source, name=name)
    wanted = settings_of(source, files=files, settings=order.settings, seed=order.seed, tokenizer=tokenizer.fingerprint)
    before = place.sizes()  # ahead of the plan: another may write one at any moment
    plan = _read_plan(place)
    if place.read(MANIFEST) is not None:
        return _whole(order, place=place, wanted=wanted, plan=plan, files=files)
    if plan is None or not _goes_on(plan, place=place, wanted=wanted, files=files):
        _refuse_foreign(place, plan=plan, files=before)
        plan = plan_source(name, source, files=files, settings=wanted, data=order.settings)
        place.write(FILE, plan.encode())
    _forget_invalid(plan, place=place, token=order.token)
    job = order.job(plan, place=place)
    _ = job.steps  # a package or a model that is missing is known now
    return job


def reopen_job(order: Order, name: str) -> Job:
    """The job of a source that was opened before, in another process."""
    place = open_place(order.data_dir, name)
    plan = _read_plan(place)
    if plan is None:
        raise DataError(f"{place.path(FILE)} is gone; a source that is being prepared has one; run `phidias data` again")
    return order.job(plan, place=place)


def _read_plan(place: Place) -> Plan | None:
    data = place.read(FILE)
    return decode_plan(data, path=place.path(FILE)) if data is not None else None


def _whole(order: Order, *, place: Place, wanted: Settings, plan: Plan | None, files: Sequence[InputFile]) -> Manifest:
    folder = open_folder(order.data_dir, place.name)
    manifest = read_manifest(folder)
    # What older versions did not write down: buckets and steps did not exist, and how rows are mixed changes no text.
    unsaid: Settings = {"length_buckets": "[]", "steps": "[]", "tokenizer": manifest.tokenizer.fingerprint}
    unsaid |= {key: wanted[key] for key in ("shuffle_mib", "max_row_mib", "step_files")}
    changed = changed_inputs(plan.files, files) if plan else ""
    _refuse_other(differences(unsaid | manifest.settings, wanted), place=place.path("").rstrip("/"), changed=changed)
    if plan:
        tidy(place, plan=plan)
    if damaged := damaged_shards(folder, manifest=manifest):
        raise DataError(
            f"source '{place.name}': {'; '.join(damaged)}; shards are written once and never repaired; "
            f"restore them, or remove {folder.place} and run `phidias data` again"
        )
    return manifest


def _refuse_other(differing: Sequence[str], *, place: str, changed: str = "") -> None:
    if differing:
        raise DataError(
            f"source '{Path(place).name}' was prepared with other settings: {'; '.join(differing)}{changed}; "
            f"prepared data is never overwritten; remove {place} or choose another run.data_dir"
        )


def _goes_on(plan: Plan, *, place: Place, wanted: Settings, files: Sequence[InputFile]) -> bool:
    """Whether what was begun is what is wanted. A plan of which nothing is done may be made anew."""
    differing = differences(plan.settings, wanted)
    if not differing:
        return True
    done, what = len(finished_tasks(place)), f"{'; '.join(differing)}{changed_inputs(plan.files, files)}"
    where = place.path("").rstrip("/")
    if done:
        raise DataError(
            f"source '{place.name}' was begun with other settings, and {done:,} of its tasks are done: {what}; "
            f"what two settings made is never mixed; go back to those, or remove {where}"
        )
    if place.is_claimed():
        raise DataError(
            f"source '{place.name}' is being prepared with other settings by another process: {what}; stop that one first, "
            f"or wait for its end; claims of a dead machine in {where}/claims end after {STALE_S:.0f} s"
        )
    return False


def _refuse_foreign(place: Place, *, plan: Plan | None, files: Iterable[str]) -> None:
    if plan is None and any(not name.endswith(".partial") for name in files):
        raise DataError(
            f"{place.path('').rstrip('/')} holds files, and neither a manifest.json nor a plan.json; a source has its folder "
            "to itself; remove or rename it; shards that Megatron wrote are taken over by `phidias data action=import`"
        )


def _forget_invalid(plan: Plan, *, place: Place, token: str) -> None:
    """Receipts of another plan, or of files that are gone, are no receipts: their tasks are done again."""
    for other in place.sizes(FAILED).keys() - {token}:  # what failed in this call stays failed for all its workers
        place.remove(f"{FAILED}/{other}")
    tasks = finished_tasks(place)  # ahead of the sizes: others finish more meanwhile
    folders = {stage.name for stage in plan.stages} | {"", "rejects", "dropped"}
    sizes = {f"{folder}/{file}".lstrip("/"): size for folder in folders for file, size in place.sizes(folder).items()}
    for task in tasks:
        if not is_valid(read_receipt(place, task=task), plan=plan.digest, sizes=sizes) and place.read(MANIFEST) is None:
            place.remove(f"{FOLDER}/{task}.json")
    if isinstance(place, LocalPlace):
        place.sweep()


def _check_buckets(buckets: Sequence[int]) -> None:
    if list(buckets) != sorted(set(buckets)):
        raise DataError(f"data.length_buckets is {list(buckets)}; each length is larger than the one before; sort the list")
