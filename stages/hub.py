"""One question to the Hugging Face hub, before libraries that would repeat theirs for most of a minute."""

from __future__ import annotations

import textwrap
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

_SECONDS = 10.0
_REASON_LENGTH = 160


def in_short(error: BaseException) -> str:
    """An error in one line."""
    text = textwrap.shorten(str(error), _REASON_LENGTH)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def why_unreachable(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub doesn't answer, or None where it does, whatever it answers about ``name``.

    None too where HF_HUB_OFFLINE is set: the libraries then look only at what they keep in HF_HOME, at once.
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return None
    except Exception as error:  # the HTTP library's own classes, which change with its version
        return f"the Hugging Face hub can't be reached, {in_short(error)}"
    return None
