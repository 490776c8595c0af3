"""What a training worker does with its share of a list of networks to train."""

from prism_ray.stages.distill import Distiller
from prism_ray.stages.teach import make_teacher
from prism_ray.work import TeacherItem, TrainingItem


class TrainingWorker:
    """Trains teachers and students one after another; an item that is done already costs nothing."""

    def __init__(self) -> None:
        self._distiller = Distiller()

    def process(self, item: TrainingItem) -> None:
        """Train and publish one network."""
        if isinstance(item, TeacherItem):
            make_teacher(item)
        else:
            self._distiller.train(item)
