"""What config.json of an export says of rotary embeddings."""

from typing import Any

from launcher.config.schema import StageSettings


def rope_parameters(stage: StageSettings) -> dict[str, Any]:
    """The fields of config.json, in the form that transformers 4 writes and 5 still reads, as do vLLM and llama.cpp; `type` is
    how transformers before 4.43 called `rope_type`.

    Transformers 5 takes `original_max_position_embeddings` at the top level over that inside. Of YaRN transformers 4.48 to 4.56
    take the factor to be max_position_embeddings over the original length: so that is how far the factor reaches, which may be
    more than the stage was trained on."""
    scaling = stage.rope_scaling
    base: dict[str, Any] = {
        "max_position_embeddings": stage.seq_length,
        "original_max_position_embeddings": stage.seq_length,
        "rope_theta": float(stage.rotary_base),
        "rope_scaling": None,
    }
    if scaling is None:
        return base
    found: dict[str, Any] = {"rope_type": scaling.rope_type, "type": scaling.rope_type, "factor": scaling.factor}
    original = scaling.original_max_position_embeddings
    base |= {"original_max_position_embeddings": original, "rope_scaling": found}
    if scaling.rope_type == "yarn":
        betas = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        found |= {"original_max_position_embeddings": original, **betas}
        base |= {"max_position_embeddings": int(scaling.factor * original)}
    return base
