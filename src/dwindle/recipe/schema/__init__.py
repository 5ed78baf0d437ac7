"""What a recipe may say, as checked values: the model, the data, the stages in their order, the algorithms."""

from dwindle.recipe.schema.automatic import AutoStage
from dwindle.recipe.schema.compression import ALGORITHMS, Algorithm, CompressionRecipe
from dwindle.recipe.schema.model_and_data import CalibrationPart, DataPart, ModelPart
from dwindle.recipe.schema.part import Part
from dwindle.recipe.schema.quantizing import LearnedRounding, QuantizeStage
from dwindle.recipe.schema.searching import SearchPart, SearchTiming
from dwindle.recipe.schema.showing import ExportStage, MeasureStage, ReportStage
from dwindle.recipe.schema.shrinking import FactorizeStage, PruneStage
from dwindle.recipe.schema.stage import OriginalStage, Stage
from dwindle.recipe.schema.training import (
    Distillation,
    EarlyStopping,
    FinetuneStage,
    QuantizationInTraining,
    TrainStage,
)
from dwindle.recipe.schema.whole import STAGES, Recipe

__all__ = [
    "ALGORITHMS",
    "STAGES",
    "Algorithm",
    "AutoStage",
    "CalibrationPart",
    "CompressionRecipe",
    "DataPart",
    "Distillation",
    "EarlyStopping",
    "ExportStage",
    "FactorizeStage",
    "FinetuneStage",
    "LearnedRounding",
    "MeasureStage",
    "ModelPart",
    "OriginalStage",
    "Part",
    "PruneStage",
    "QuantizationInTraining",
    "QuantizeStage",
    "Recipe",
    "ReportStage",
    "SearchPart",
    "SearchTiming",
    "Stage",
    "TrainStage",
]
