"""The error of models, and what makes it of whatever transformers raises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...metrics_dsl.errors import SecateurError

_ALONE = threading.RLock()  # transformers changes torch for the whole process while it makes a model


class ModelError(SecateurError):
    """A model that cannot be loaded or has no prunable decoder blocks."""


@contextmanager
def transformers_reading(source: str) -> Iterator[None]:
    """Let transformers read something of a model: without reports of its own, errors as sentences.

    Raises:
        ModelError: When it cannot.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what is told as an error is raised as well
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # Each call says whether code may run; a question that is asked all the same has its answer.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        with _ALONE:
            yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a file that nobody checked makes of transformers
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"expected a model that transformers knows, got {source}, which needs code of its own; give "
                "--trust-remote-code to run it"
            ) from None
        raise ModelError(f"transformers cannot load the model {source!r}: {_reason(error)}") from error


@contextmanager
def transformers_writing() -> Iterator[None]:
    """Let transformers write something of a model.

    Raises:
        ModelError: When it cannot.
        OSError: When the disk is full or fails; safetensors has an error of its own for that.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # whatever it does not know how to write
        raise ModelError(f"transformers cannot write the model: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what an error says, in one line."""
    words = " ".join(str(error).split()).partition(" Model type should be one of ")[0]
    found = "".join(c for c in words if c.isprintable())[:300]
    return found if len(found.split()) > 2 else f"{type(error).__name__} {found}".strip()
