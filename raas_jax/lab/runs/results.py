"""The folder of a run: its configuration, and one JSON line per sample.

run.json            configuration; every start with versions and device
samples.jsonl       one line per sample, appended and flushed as it is finished
samples.bad.jsonl   lines that could not be read, kept aside
table.md, table.csv made from the two above by `raas-jax report`
.lock               held by the process that adds to the folder
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

RUN, SAMPLES, BAD, LOCK = "run.json", "samples.jsonl", "samples.bad.jsonl", ".lock"
KEY = ("task", "policy", "item", "sample")  # What names a sample within a run.
Sample = dict[str, Any]
Cell = tuple[str, str]
"""The label of a task and that of a policy: what one line of a table is made of."""


class Results:
    """Samples of a run in its folder; one that was opened to add to it is closed by a `with`.

    Attributes:
      folder: where they are.
      config: what the run is: the same for every start that adds to the folder.
      samples: those that are finished, by (task, policy, item, sample).
      bad: lines that could not be read.
      repeated: lines that repeated a sample; the first counts.
      starts: how often the run was started, this time included.
    """

    def __init__(self, folder: Path, config: dict[str, Any], samples: list[Sample], bad: list[str]):
        self.folder = folder
        self.config = config
        self.samples: dict[tuple[str, ...], Sample] = {}
        self._cells: dict[Cell, list[Sample]] = {}
        self.bad = bad
        self.repeated = 0
        self.starts = 0
        self._lock: FileLock | None = None
        for sample in samples:
            if _key(sample) in self.samples:
                self.repeated += 1
            else:
                self._take(sample)

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """Reads a folder and changes nothing in it.

        Raises:
          FileNotFoundError: it holds no run. ValueError: `run.json` is not readable.
        """
        path = Path(folder)
        if not (path / RUN).is_file():
            raise FileNotFoundError(
                f"{path} holds no {RUN}; give the --out folder of a `raas-jax eval`."
            )
        try:
            config = json.loads((path / RUN).read_text())["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / RUN} is not a run's configuration ({error}).") from error
        good, bad = [], []
        for line in _lines(path / SAMPLES):
            sample = _parse(line)
            if sample is None:
                bad.append(line)
            else:
                good.append(sample)
        return cls(path, config, good, bad)

    @classmethod
    def open(
        cls, folder: str | Path, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> Results:
        """Starts a run, or goes on with one; lines that cannot be read are kept aside.

        Args:
          folder: made if it is not there.
          config: JSON values; must equal that of the run in the folder, if there is one.
          environment: versions and device of this start, added to `run.json`.

        Raises:
          ValueError: the folder belongs to another run, with what differs, or to something else, or
            another process adds to it.
          OSError: it cannot be written.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"--out is {str(folder)!r}, which is a file; give a folder.") from None
        if not (path / RUN).is_file() and any(file.name != LOCK for file in path.iterdir()):
            raise ValueError(
                f"{path} holds files but no {RUN}, so it is no folder of a run; give another --out."
            )
        lock = FileLock(path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{path} is in use by another process; wait for it, or give another --out."
            ) from None
        try:
            found = cls._open_locked(path, config, environment)
        except BaseException:
            lock.release()
            raise
        found._lock = lock
        return found

    @classmethod
    def _open_locked(
        cls, path: Path, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> Results:
        wanted: dict[str, Any] = json.loads(json.dumps(config))
        starts = []
        if (path / RUN).is_file():
            found = cls.read(path)
            different = differences(found.config, wanted)
            if different:
                raise ValueError(
                    f"{path} holds another run; give a new --out, or the same options. "
                    "There → here:\n  " + "\n  ".join(different)
                )
            starts = json.loads((path / RUN).read_text()).get("starts", [])
            if found.bad:
                with (path / BAD).open("a", encoding="utf-8") as file:
                    file.writelines(line.rstrip("\n") + "\n" for line in found.bad)
                lines = (json.dumps(sample) + "\n" for sample in found.samples.values())
                write(path / SAMPLES, "".join(lines))
        else:
            found = cls(path, wanted, [], [])
        # Written before the first sample, so that every sample has its configuration.
        whole = {"config": wanted, "starts": [*starts, dict(environment)]}
        write(path / RUN, json.dumps(whole, indent=1) + "\n")
        found.starts = len(whole["starts"])
        return found

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
        return said


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, one readable line each."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(key for key in here if key not in there)]
        inside = ((there.get(k, "(none)"), here.get(k, "(none)"), f"{name}.{k}") for k in names)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        inside = ((a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(there, here, strict=True)))
    elif there == here:
        return []
    else:
        return [f"{name.lstrip('.')}: {_short(there)} → {_short(here)}"]
    return [line for a, b, inner in inside for line in differences(a, b, inner)]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _key(sample: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(sample[name]) for name in KEY)


def _lines(file: Path) -> Iterator[str]:
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as stream:
            yield from (line for line in stream if line.strip())


def _parse(line: str) -> Sample | None:
    """The sample on a line, None if it is not whole."""
    try:
        sample = json.loads(line)
    except ValueError:
        return None
    # A line without its end may be a shorter number than was meant.
    good = line.endswith("\n") and isinstance(sample, dict) and all(key in sample for key in KEY)
    return sample if good else None


def write(file: Path, text: str) -> None:
    """Replaces a file at once, so that a kill leaves the old or the new one."""
    fresh = file.with_name(file.name + ".new")
    with fresh.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, file)
