"""Build the parser of a command's options once; tyro takes 35 ms to build it for each command line that is parsed."""

from __future__ import annotations

from typing import Any

from tyro._parsers import ParserSpecification


def build_parsers_once() -> None:
    """Let tyro keep the parser of each type of options, which it only reads."""
    build, built = ParserSpecification.from_callable_or_type, dict[object, ParserSpecification]()

    def kept(options_type: Any, **how: Any) -> ParserSpecification:
        if how["parent_classes"]:  # a part of another one
            return build(options_type, **how)
        key = (options_type, how["description"], how["default_instance"])
        if key not in built:
            built[key] = build(options_type, **how)
        return built[key]

    ParserSpecification.from_callable_or_type = staticmethod(kept)
