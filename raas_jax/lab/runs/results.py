"""The folder of a run: its configuration, and one JSON line per sample.

run.json                version of this layout; configuration; versions and device of every start
samples.jsonl           one line per sample, appended and flushed as it is finished
samples.bad.jsonl       lines that could not be read, kept aside
speed.json, steps.json  times of a study, apart from its samples
table.md, table.csv     made from the others by `raas-jax report`
.lock                   held by the process that adds to the folder
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raas_jax import files
from raas_jax.files import Fields, FileError
from raas_jax.lab.differences import differences
from raas_jax.lab.runs.layout import BAD, KEY, LOCK, RUN, SAMPLES, SPEED, STEPS, Layout, Sample

VERSION = 3
"""The layout's. Folders of version 1 name none, and their policies' options had other names; those
of version 2 have no fingerprint of the whole model."""
# What processes that were killed left behind before temporary files had names of their own.
_OLD_LEFTOVERS = {f"{name}.new" for name in (RUN, SAMPLES, SPEED, STEPS)}


def migrated(config: Any) -> Any:
    """What a configuration of version 1 says, under the names of version 2; JSON values."""
    if isinstance(config, list):
        return [migrated(each) for each in config]
    if not isinstance(config, dict):
        return config
    found = {name: migrated(value) for name, value in config.items()}
    if str(found.get("share")) in ("kv_head", "layer"):
        found["granularity"] = found.pop("share")
    if str(found.get("prompt")) in _PROMPT:
        found["prompt"] = _PROMPT[found["prompt"]]
    if "Policy" in found:  # Made of options; other labels are the user's own words.
        found |= {name: migrated_label(str(found.get(name))) for name in ("label", "Policy")}
    if found.get("title") == "Recall to the first slip":
        found["title"] = "Recall to the first error"
    return found


def migrated_label(label: str) -> str:
    """The label of a policy of version 1, such as `raas (share=layer) 64`, in version 2."""
    label = re.sub(r"(?<=[( ])share=(?=kv_head|layer)", "granularity=", label)
    return re.sub(r"(?<=[( ]prompt=)(beside|within)\b", lambda found: _PROMPT[found[0]], label)


_PROMPT = {"beside": "excluded", "within": "included"}


class Results:
    """Samples of a run in its folder; one that was opened to add to it is closed by a `with`.

    Attributes:
      folder: where they are.
      config: what the run is: the same for every start that adds to the folder.
      layout: what it says of cells and samples.
      samples: those that are finished, by (task, policy, item, sample).
      bad: lines that could not be read.
      repeated: lines that repeated a sample; the first counts.
      starts: versions and device of every start.
      version: of the files that were read.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder = folder
        self.layout = Layout(config, folder / RUN)
        self.config: dict[str, Any] = dict(config)
        self.samples: dict[tuple[str, ...], Sample] = {}
        self._cells: dict[tuple[str, str], list[Sample]] = {}
        self.bad: list[str] = []
        self.repeated = 0
        self.starts: list[dict[str, Any]] = []
        self.version = VERSION
        self._lock: FileLock | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """Reads a folder and changes nothing in it.

        Raises:
          FileNotFoundError: it holds no run. FileError: `run.json` is not readable, or of a later
            version; `samples.jsonl` is no file.
        """
        path = Path(folder)
        try:
            run = Fields(files.read_fields(path / RUN), path / RUN)
        except (FileNotFoundError, NotADirectoryError):
            what = f"folder is {str(path)!r}, which holds no {RUN} of a run."
            raise FileNotFoundError(what) from None
        version = run.integer("version", 1, default=1)
        if version > VERSION:
            raise FileError(
                path / RUN,
                f"has version {version}, and this raas_jax knows {VERSION}; use the one that wrote "
                "it, or a later one.",
            )
        config = run.inner("config").values
        found = cls(path, migrated(config) if version == 1 else config)
        found.version = version
        if "starts" in run.values:
            found.starts = [dict(start.values) for start in run.each("starts")]
        try:
            for line in filter(str.strip, files.lines(path / SAMPLES)):
                found._take_line(line)
        except FileNotFoundError:
            pass  # None is finished yet.
        return found

    def _take_line(self, line: str) -> None:
        try:
            sample = self.layout.sample(line)
        except ValueError:
            self.bad.append(line)
            return
        if self.version == 1 and self.layout.kind != "study":
            sample["policy"] = migrated_label(sample["policy"])
        if _key(sample) in self.samples:
            self.repeated += 1
        else:
            self._take(sample)

    @classmethod
    def open(
        cls,
        out: str | Path,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        grows: Mapping[str, Sequence[str]] | None = None,
    ) -> Results:
        """Starts a run, or goes on with one; lines that cannot be read are kept aside.

        Args:
          out: folder; made if it is not there.
          config: JSON values; must equal that of the run in the folder, if there is one.
          environment: versions and device of this start, added to `run.json`.
          grows: lists in the configuration to which a later start may add, with the fields that
            name their entries.

        Raises:
          ValueError: the folder belongs to another run, with what differs, or to something else, or
            another process adds to it.
          OSError: it cannot be written.
        """
        path, given = Path(out), f"out is {str(out)!r}, which"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"{given} is a file; give a folder.") from None
        there = os.path.lexists(path / RUN)
        if not there and not all(_is_nothing(file.name) for file in path.iterdir()):
            raise ValueError(f"{given} holds files but no {RUN}, so it is no folder of a run.")
        lock = FileLock(path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{given} is in use by another process; wait for it.") from None
        wanted: dict[str, Any] = json.loads(json.dumps(config))
        try:
            found = cls.read(path) if there else cls(path, wanted)
            if found.version < VERSION and "fingerprint" in wanted:
                # What it knows of its weights is in `wanted` too, and is compared.
                found.config["fingerprint"] = wanted["fingerprint"]
            elif "fingerprint" in wanted:
                # It says all; the digest of some weights depends on how a config is written, too.
                found.config["weights"] = wanted.get("weights")
            for name, keys in (grows or {}).items():
                here, there_now = (_by_name(each[name], keys) for each in (wanted, found.config))
                both = [*there_now, *(key for key in here if key not in there_now)]
                found.config[name] = [there_now.get(key, here.get(key)) for key in both]
                wanted[name] = [here.get(key, there_now.get(key)) for key in both]
            if different := differences(found.config, wanted):
                raise ValueError(
                    f"{given} holds another run; give a new folder, or the same options. "
                    "There → here:\n  " + "\n  ".join(different)
                )
            found.layout = Layout(found.config, path / RUN)
            found._start(environment)
        except BaseException:
            lock.release()
            raise
        found._lock = lock
        return found

    def _start(self, environment: Mapping[str, Any]) -> None:
        if self.bad:
            with (self.folder / BAD).open("a", encoding="utf-8") as file:
                file.writelines(line.rstrip("\n") + "\n" for line in self.bad)
        if self.bad or self.version < VERSION:
            lines = (json.dumps(sample) + "\n" for sample in self.samples.values())
            files.replace_text(self.folder / SAMPLES, "".join(lines))
        self.starts.append(dict(environment))
        # Written before the first sample, so that every sample has its configuration.
        run = {"version": VERSION, "config": self.config, "starts": self.starts}
        write_json(self.folder / RUN, run)

    def close(self) -> None:
        """Lets other processes add to the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, sample: Sample) -> None:
        """Appends a sample; what was written before stays valid if this fails (a full disk)."""
        key = _key(sample)
        if key in self.samples:
            raise ValueError(f"sample {key} is there already")
        file = self.folder / SAMPLES
        line = (json.dumps(sample) + "\n").encode()
        # Unbuffered: what a full disk refused must not be written again when the file is closed.
        with file.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                while line:
                    line = line[stream.write(line) :]
            except OSError as error:
                os.truncate(file, before)
                raise OSError(
                    error.errno,
                    f"{error.strerror}; the {len(self.samples)} samples before are safe, and the "
                    "same command goes on from there",
                    str(file),
                ) from error
        self._take(sample)

    def _take(self, sample: Sample) -> None:
        self.samples[_key(sample)] = sample
        self._cells.setdefault((sample["task"], sample["policy"]), []).append(sample)

    def of(self, task: str, policy: str) -> list[Sample]:
        """The finished samples of one policy on one task, in the order of their items."""
        found = self._cells.get((task, policy), [])
        return sorted(found, key=lambda each: (len(str(each["item"])), *_key(each)[2:]))

    def remarks(self) -> list[str]:
        """What a reader should know about the file, in sentences."""
        said = []
        if self.bad:
            said.append(
                f"{len(self.bad)} unreadable line(s) in {self.folder / SAMPLES} left out"
                f" (a run that goes on keeps them in {BAD})"
            )
        if self.repeated:
            said.append(f"{self.repeated} repeated sample(s) left out; the first of each counts")
        known = {(cell["task"], cell["label"]) for cell in self.layout.cells()}
        if strays := sum(len(each) for key, each in self._cells.items() if key not in known):
            said.append(f"{strays} sample(s) of a task or policy that {RUN} does not have left out")
        return said


def _key(sample: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(sample[name]) for name in KEY)


def _by_name(entries: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[Any, Any]:
    return {tuple(entry.get(key) for key in keys): entry for entry in entries}


def _is_nothing(name: str) -> bool:
    """Whether a file of this name may lie in the folder of a run that has not begun."""
    return name == LOCK or name in _OLD_LEFTOVERS or files.is_leftover(name)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a file that is the old or the new one after a kill."""
    files.replace_text(file, json.dumps(values, indent=1) + "\n")
