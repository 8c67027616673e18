"""What --model-loader-extra-config may hold for --load-format tierewrite, and the versions of vLLM that were tested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tierewrite.errors import UsageError, shown
from tierewrite.planning.policy import OPTIONS, of_type, type_names

TESTED = ("0.32.0", "0.33.0")
"""The versions of vLLM that this was tested with."""

READERS = ("safetensors", "fastsafetensors", "instanttensor")
"""vLLM's own readers of safetensors files that may read in place of ours (`inner_format`)."""

OF_VLLM = ("enable_multithread_load", "num_threads", "enable_weights_track")
"""Members of the extra config that are vLLM's default loader's."""

OWN: Mapping[str, tuple[type, ...]] = {
    "ties": (str, dict),
    "trust_remote_code": (bool,),
    "ignore_unindexed": (bool,),
    "force": (bool,),
    "loader": (str,),
    "consumer_python": (str,),
    "device": (str,),
    "threads": (int,),
    "remember": (bool,),
    "inner_format": (str,),
    "any_version": (bool,),
}
"""Members that are ours, besides those of planning.policy.OPTIONS; the first nine are arguments of `stream`."""


def checked_options(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The members of --model-loader-extra-config that are ours.

    Raises:
        UsageError: one does not exist, or is of another type.
    """
    for name, value in extra.items():
        if name not in OWN and name not in OPTIONS:
            raise UsageError(
                f"--model-loader-extra-config has no '{shown(name)}' for --load-format tierewrite; there are "
                f"{', '.join((*OPTIONS, *OWN, *OF_VLLM))}"
            )
        if name in OWN and not of_type(value, OWN[name]):
            raise UsageError(f"'{name}' in --model-loader-extra-config is {value!r}; expected {type_names(OWN[name])}")
    found = {"loader": "off", "remember": True, **extra}
    reader = found.get("inner_format")
    if reader is not None and reader not in READERS:
        raise UsageError(
            f"'inner_format' in --model-loader-extra-config is '{shown(reader)}'; expected one of {', '.join(READERS)}"
        )
    return found


def refuse_untested(version: str, any_version: bool) -> None:
    """Raises UsageError for a version of vLLM that this was not tested with, unless `any_version`."""
    if version.partition("+")[0] not in TESTED and not any_version:
        raise UsageError(
            f"--load-format tierewrite was tested with vLLM {' and '.join(TESTED)}, and this is {version}: it may load "
            "wrong weights without an error. Rewrite the checkpoint and load that, or try it with "
            "--model-loader-extra-config '{\"any_version\": true}'"
        )
