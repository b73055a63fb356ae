"""The kinds of numbers that specs are made of."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", defer_build=True)


def _refuse_bool(value: Any) -> Any:
    """Python counts True as 1: `layout.tp=true` would pass as a number."""
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool)]

Share = Annotated[Float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0.0, allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(gt=0)]
