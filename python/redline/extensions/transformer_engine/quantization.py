"""Types of quantised training's configuration: read, so that files load, and refused in use."""

import enum
from dataclasses import dataclass, fields

from redline.extensions.transformer_engine.refusals import not_built
from redline.extensions.transformer_engine.table import works

_DISCRIMINATOR = "transformer_engine_config_type"


@works("no arithmetic: read, and refused in use")
class TransformerEngineConfigType(enum.Enum):
    """What stands under the key transformer_engine_config_type."""

    TEQuantizationParams = "TEQuantizationParams"


@works("no arithmetic: read, and refused in use")
@dataclass
class TEQuantizationRecipe:
    """How the products of one module are quantised."""

    fp8_quantization_recipe: str | None = None
    fp4_quantization_recipe: str | None = None
    custom_recipe_factory: str | None = None
    fp8_format: str = "e4m3"
    override_quantized_autocast: bool = True
    override_nonquantized_autocast: bool = False
    tp_only_amax_red: bool = False
    fp8_param: bool = False
    fp4_param: bool = False

    @classmethod
    def get_config_keys(cls):
        return {field.name for field in fields(cls)}

    @classmethod
    def parse_from_config(cls, quant_config):
        """From a dict of these fields; a ValueError names what does not fit."""
        unknown = set(quant_config) - cls.get_config_keys()
        if unknown:
            raise ValueError(
                f"TEQuantizationRecipe: expected keys of {sorted(cls.get_config_keys())}, "
                f"not {sorted(unknown)}"
            )
        recipe = cls(**quant_config)
        if recipe.fp8_quantization_recipe == "delayed":
            raise ValueError(
                "TEQuantizationRecipe: fp8_quantization_recipe: expected one that a module can "
                "have alone, not delayed"
            )
        if recipe.fp8_quantization_recipe and recipe.fp4_quantization_recipe:
            raise ValueError(
                "TEQuantizationRecipe: expected a recipe of FP8 or of FP4, not both: "
                f"{recipe.fp8_quantization_recipe}, {recipe.fp4_quantization_recipe}"
            )
        custom = "custom" in (recipe.fp8_quantization_recipe, recipe.fp4_quantization_recipe)
        if custom and recipe.custom_recipe_factory is None:
            raise ValueError(
                "TEQuantizationRecipe: custom_recipe_factory: expected one beside custom, not none"
            )
        return recipe


@works("no arithmetic: read, and refused in use")
@dataclass
class TEQuantizationParams:
    """The recipe of a module in training, and where given another in evaluation."""

    training_recipe: TEQuantizationRecipe
    evaluation_recipe: TEQuantizationRecipe | None = None

    @staticmethod
    def parse_from_config(quant_config):
        """From Megatron's QuantizationConfig, or its dict."""
        config = dict(getattr(quant_config, "config", quant_config))
        kind = config.pop(_DISCRIMINATOR, None)
        expected = TransformerEngineConfigType.TEQuantizationParams.value
        if kind != expected:
            raise ValueError(
                f"TEQuantizationParams: {_DISCRIMINATOR}: expected {expected}, not {kind}"
            )
        unknown = set(config) - {"training_recipe", "evaluation_recipe"}
        if unknown or "training_recipe" not in config:
            raise ValueError(
                "TEQuantizationParams: expected training_recipe and perhaps evaluation_recipe, "
                f"not {sorted(config)}"
            )
        recipes = {key: TEQuantizationRecipe.parse_from_config(config[key]) for key in config}
        return TEQuantizationParams(**recipes)


TEDelayedScaling = not_built(
    "TEDelayedScaling", "products in FP8 are not built", "bfloat16 works: leave fp8 unset"
)
TELMHeadColumnParallelLinear = not_built(
    "TELMHeadColumnParallelLinear",
    "products in MXFP8 are not built",
    "TEColumnParallelLinear works",
)
TEFusedMLPWithGroupedLinear = not_built(
    "TEFusedMLPWithGroupedLinear",
    "products in MXFP8 are not built",
    "TEFusedMLP works",
)
