"""One question to the Hugging Face hub, before libraries that would repeat theirs for most of a minute."""

from __future__ import annotations

from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from stages.one_line import named

_SECONDS = 10.0


def why_unreachable(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub doesn't answer, or None where it does, whatever it answers about ``name``.

    None too where HF_HUB_OFFLINE is set: the libraries then look only at what they keep in HF_HOME, at once.
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return None
    except Exception as error:  # the HTTP library's own classes, which change with its version
        return f"the Hugging Face hub can't be reached, {named(error)}"
    return None
