"""What a training worker does with its share of a list: networks to train, real images and runs to measure."""

from prism_ray.stages.data_parallel import ALONE, Group
from prism_ray.stages.distill import Distiller
from prism_ray.stages.starts import make_starts
from prism_ray.stages.statistics import make_statistics
from prism_ray.stages.teach import make_teacher
from prism_ray.storage import storage_errors
from prism_ray.work import (
    CalibrationItem,
    GeneratorItem,
    Item,
    PhrasesItem,
    PromptsItem,
    SearchItem,
    StartsItem,
    StatisticsItem,
    StudentItem,
    TeacherItem,
    address_of,
)


class ItemWorker:
    """Does items one after another; one that is done already costs nothing."""

    def __init__(self) -> None:
        self._distiller = Distiller()

    def process(self, item: Item, group: Group = ALONE) -> None:
        """Do one item and publish its result; a full disk is one line. Only a student is for a whole group."""
        with storage_errors(address_of(item)):
            if isinstance(item, TeacherItem):
                make_teacher(item)
            elif isinstance(item, GeneratorItem):
                from prism_ray.stages.generator import make_generator  # imports diffusers, which few workers need

                make_generator(item)
            elif isinstance(item, PhrasesItem):
                from prism_ray.stages.phrases import make_phrases

                make_phrases(item)
            elif isinstance(item, PromptsItem):
                from prism_ray.stages.prompts import make_prompts

                make_prompts(item)
            elif isinstance(item, CalibrationItem):
                from prism_ray.stages.calibration import make_calibration

                make_calibration(item)
            elif isinstance(item, StatisticsItem):
                make_statistics(item)
            elif isinstance(item, StartsItem):
                make_starts(item)
            elif isinstance(item, StudentItem):
                self._distiller.train(item, group)
            elif isinstance(item, SearchItem):
                self._distiller.search(item)
            else:
                from prism_ray.stages.evaluate import measure_diversity  # imports torchmetrics

                measure_diversity(item)
