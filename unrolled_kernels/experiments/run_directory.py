"""The directory of a run: its settings, its results and its checkpoints, all written so that a kill loses nothing."""

import contextlib
import json
import os
import secrets
import shutil
import threading
from pathlib import Path

import pandas as pd
import pyarrow as pa
from safetensors import SafetensorError

_UNFINISHED = ".unfinished-"


class RunDirectory:
    """``config.json``, ``results.parquet`` and ``checkpoints/`` of one run.

    Opening a directory that holds a run with the same settings continues it.

    Args:
        path: the directory; made if need be.
        config: the settings that decide the results, a dict that JSON can hold.
        environment: versions and the like, written down beside them and never compared.
        columns: what every row of the table has.
        part: where several processes share the run, the name of this one's part of the table, kept in
            ``results-PART.parquet``. The process without one takes over the parts that an earlier run left behind.
    Raises:
        ValueError: the directory holds a run with other settings (the message names those that differ), or its
            ``config.json`` or its table is damaged.
        OSError: the directory cannot be made or written.
    """

    def __init__(self, path, config, environment=None, part=None, columns=()):
        self.path = Path(path)
        self.results_file = self.path / (f"results-{part}.parquet" if part else "results.parquet")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.path}: no directory can be made there ({error}); give another --out") from None
        self._lock = threading.Lock()
        config = json.loads(json.dumps(config))
        file = self.path / "config.json"
        if file.exists():
            _refuse_other_settings(file, _read_config(file), config)
        else:
            text = json.dumps({"settings": config, "environment": environment or {}}, indent=2)
            with atomic_path(file) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        # what a killed process was writing
        for file in [] if part else [*self.path.glob(f"{_UNFINISHED}*"), *self.path.glob(f"*/{_UNFINISHED}*")]:
            file.unlink(missing_ok=True)
        self._rows = _read_rows(self.results_file, columns)
        for file in [] if part else sorted(self.path.glob("results-*.parquet")):
            self.append(_read_rows(file, columns))
            file.unlink()

    def results(self):
        """Every finished model so far: a DataFrame with one row each, empty where there is none."""
        with self._lock:
            return pd.DataFrame(self._rows)

    def append(self, rows):
        """Add finished models, a list of dicts, to ``results.parquet``; the file is whole at every moment."""
        with self._lock:
            self._rows = self._rows + list(rows)
            if not self._rows:
                return
            with atomic_path(self.results_file) as temporary:
                pd.DataFrame(self._rows).to_parquet(temporary, index=False)

    def clear(self):
        """Forget the finished models: another process keeps them."""
        with self._lock:
            self._rows = []
            self.results_file.unlink(missing_ok=True)

    def checkpoint_file(self, name):
        """Where the state of unfinished work called ``name`` is kept."""
        directory = self.path / "checkpoints"
        directory.mkdir(exist_ok=True)
        return directory / f"{name}.safetensors"

    def remove_checkpoints(self):
        """Forget the state of unfinished work: all of it is finished."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def atomic_path(file):
    """A path to write to, which becomes ``file`` when the block ends without an error.

    Raises:
        OSError: it cannot be written; the message names ``file``.
    """
    file = Path(file)
    # known before it is there, so that an interrupt at any moment leaves nothing behind; the same suffix: writers of
    # images and tables choose the format by it
    temporary = file.with_name(f"{_UNFINISHED}{file.stem}-{secrets.token_hex(4)}{file.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{file}: cannot be written ({error}); whatever was finished is still there: make room, or make the "
            "directory writable, and give the same command again"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read_rows(file, columns):
    if not file.exists():
        return []
    try:
        table = pd.read_parquet(file)
        missing = [name for name in columns if name not in table]
        if missing:
            raise ValueError(f"it has no columns {', '.join(missing)}")
        return table.to_dict("records")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{file}: not a readable results table (truncated, or of another kind): {error}; "
            "restore it, or delete it to train its models again"
        ) from None


def _read_config(file):
    try:
        # a copy: what is no dict fails here
        return dict(json.loads(file.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: not the settings of a run (truncated, or of another kind): {error!r}; "
            "restore it, or give another --out"
        ) from None


def _refuse_other_settings(file, there, asked):
    absent = "nothing"
    differing = [
        f"{name} (there {there.get(name, absent)}, asked {asked.get(name, absent)})"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name, absent) != asked.get(name, absent)
    ]
    if differing:
        raise ValueError(
            f"{file.parent}: this directory holds a run with other settings: {', '.join(differing)}; "
            "give another --out, or delete the directory"
        )
