"""The files of a model: where they are, and whether they are what they should be, before they are loaded."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...search.core.files import expanded, holds_calibration, holds_run
from ...search.core.reading import Given, read_json
from .errors import ModelError
from .gguf import check_gguf

_OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json")  # what holds an object of JSON
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tiktoken")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        source: As somebody named it.
        place: Its folder, or its name on the model hub.
        is_local: Whether it is a folder or file of this machine.
        gguf: The ``.gguf`` file that holds all of it; None where it is an ordinary checkpoint.
        is_offline: Whether the model hub cannot be reached, so that what was brought here has to do.
    """

    source: str
    place: str
    is_local: bool = True
    gguf: Path | None = None
    is_offline: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What transformers has to be told beside the place."""
        options: dict[str, Any] = {"gguf_file": self.gguf.name} if self.gguf else {}
        return options | ({"local_files_only": True} if self.is_offline else {})

    def find(self, name: str) -> Path | None:
        """Return the file of a name, brought here; None where there is none."""
        if self.is_local:
            place = Path(self.place)
            if place.is_file():  # the configuration alone
                return place if name == "config.json" else None
            return place / name if (place / name).exists() else None
        from transformers.utils import cached_file

        found = cached_file(
            self.place,
            name,
            local_files_only=self.is_offline,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    def read(self, name: str) -> Given | None:
        """Return what a file of JSON holds, which must be an object; None where there is none.

        Raises:
            ModelError: When it is anything else.
        """
        path = self.find(name)
        if path is None:
            return None
        given = read_json(path, f"{name} of a model", ModelError)
        given.members()
        return given

    def weights(self) -> list[Path]:
        """Return the safetensors files, brought here; none where it has others.

        Raises:
            ModelError: When one of several is missing.
        """
        if (single := self.find("model.safetensors")) is not None:
            return [single]
        given = self.read(_INDEXES[0])
        if given is None:
            return []
        names = sorted({name.text() for name in given.field("weight_map").members().values()})
        paths = {name: self.find(name) for name in names}
        if missing := [name for name, path in paths.items() if path is None]:
            raise ModelError(
                f"expected the {len(names)} files that {given.source} names, got none named {missing[0]}; "
                "bring the model here again"
            )
        return [path for path in paths.values() if path is not None]

    def has_tokenizer(self) -> bool:
        """Whether anything there may be a tokenizer."""
        if self.is_local:
            return any(path.name.lower().startswith(_TOKENIZER) for path in Path(self.place).iterdir())
        return any(self.find(name) for name in _TOKENIZER_FILES)

    def processor(self) -> list[Path]:
        """Return the files that say how images and sound are brought into the model."""
        return [path for name in _PROCESSOR if (path := self.find(name)) is not None]

    def check(self) -> None:
        """Check that its files are files, and that those in JSON are what they should be.

        Raises:
            ModelError: When they are not.
        """
        if self.find("adapter_config.json") is not None:  # transformers puts it on whatever it loads there
            raise ModelError(
                f"expected a whole model, got {self.source} with an adapter; merge it into its base model "
                "first (peft: merge_and_unload, then save_pretrained) and give the folder of that"
            )
        if self.gguf is not None:
            check_gguf(self.gguf)
            return
        if self.is_local:
            for path in Path(self.place).iterdir():
                try:
                    mode = path.stat().st_mode
                except OSError:  # a link to nowhere, which is as good as no file
                    continue
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise ModelError(
                        f"expected files and folders in a model's folder, got {path}, a pipe or device"
                    )
        for name in _OBJECTS:
            self.read(name)
        for name in _INDEXES:
            given = self.read(name)
            for shard in given.field("weight_map").members().values() if given else ():
                name = shard.text()
                if not name.isprintable() or name in ("", "..") or PurePosixPath(name).name != name:
                    raise shard.refused("the name of a file beside it")


def find_model(source: str, *, may_be_config: bool = False) -> ModelFiles:
    """Return the files of a model, checked.

    Args:
        source: A local folder, a ``.gguf`` file, or a name on the model hub.
        may_be_config: Whether a ``config.json`` alone will do.

    Raises:
        ModelError: When there is none of that name, or its files are not what they should be.
    """
    kinds = "folder, a config.json or .gguf file" if may_be_config else "model folder, a .gguf file"
    path, mode = _look(source)
    if mode is None:
        looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
        in_folder = source.count("/") == 1 and path.parent.is_dir()
        if looks_local or in_folder or source.endswith((".gguf", ".json")):
            raise ModelError(f"expected an existing {kinds} or a hub name, got {source}: not found")
        found = _on_hub(source)
    elif stat.S_ISDIR(mode):
        found = ModelFiles(source, str(path))
        if found.find("config.json") is None and found.find("adapter_config.json") is None:
            raise ModelError(f"expected a model folder with a config.json, got {_what_it_is(path)}")
    elif not stat.S_ISREG(mode):
        raise ModelError(f"expected a {kinds} or a hub name, got {path}, a pipe or device")
    elif path.suffix == ".gguf":
        found = ModelFiles(source, str(path.parent), gguf=path)
    elif may_be_config and path.suffix == ".json":
        found = ModelFiles(source, str(path))
        read_json(path, "a model's config.json", ModelError).members()
        return found
    else:
        raise ModelError(f"expected a {kinds} or a hub name, got the file {path}")
    found.check()
    return found


def _what_it_is(folder: Path) -> str:
    """Return a folder without a model in words, and what to give instead."""
    if holds_calibration(folder):
        return f"the calibration {folder}; give the model that it was made from"
    if holds_run(folder):
        return f"the run {folder}; give the model that it was run on"
    if files := sorted(folder.glob("*.gguf")):
        return f"{folder} without one; for a .gguf file give its own path, such as {files[0]}"
    return f"{folder} without one"


def _look(source: str) -> tuple[Path, int | None]:
    """Return the path of a source and what is there; None for nothing.

    Raises:
        ModelError: When it cannot be looked at.
    """
    path = expanded(source, ModelError)
    try:
        return path, path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path, None
    except (OSError, ValueError) as problem:  # a name that is too long, or a character of no path
        reason = getattr(problem, "strerror", None) or str(problem)
        raise ModelError(
            f"expected a model folder, a .gguf file or a hub name, got {source!r}: {reason}"
        ) from None


def _on_hub(source: str) -> ModelFiles:
    """Return the files of a name on the model hub, which is asked once.

    Raises:
        ModelError: When it has none of that name, or does not answer and nothing was brought here.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    why, is_offline = "", False
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"))
    except errors.HFValidationError:
        why = "and the model hub has no such names"
    except errors.GatedRepoError:
        raise ModelError(
            f"expected a model that may be had, got {source!r}, which the model hub gives to "
            "those alone whom its author lets; ask there, and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        why = "and the model hub has none of that name, or not for you"
    except errors.EntryNotFoundError:
        pass  # an adapter, say
    except Exception:  # whatever a network, a proxy or a server does
        is_offline = True
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            why = "and the model hub could not be asked for one of that name"
    if why:
        raise ModelError(f"expected a model, got {source!r}: there is no such folder here, {why}")
    found = ModelFiles(source, source, is_local=False, is_offline=is_offline)
    if found.find("config.json") is None and found.find("adapter_config.json") is None:
        raise ModelError(f"expected a model with a config.json, got {source!r} on the model hub without one")
    return found
