"""A student as one ONNX file: pixels in, logits out, its preprocessing inside.

Shapes: B images (any number), C channels, H x W pixels, K classes. Images are float32 in [0, 1].
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prism_ray.artifacts import write_durably
from prism_ray.errors import InputError, PrismError, shortened
from prism_ray.export.parts import student_files
from prism_ray.models.classifier import Classifier, load_classifier
from prism_ray.runs import Run
from prism_ray.work import StudentItem

OPSET = 18
"""The first whose Resize is antialiased, and the one that PyTorch's exporter writes without converting."""

TOLERANCE = 1e-4
"""Largest accepted difference of a logit: rounding of other kernels is about 1e-6 of the logits' size."""

BATCH_SIZES = (1, 5)


def write_onnx(run: Run, student: StudentItem, path: Path) -> None:
    """Export, compare with PyTorch, write.

    Raises:
        InputError: ONNX cannot express the network.
        PrismError: onnxruntime computes other logits.
    """
    assert run.dataset is not None
    folder = path.with_name(f"{path.name}.student")  # a copy whose bytes were compared with the receipt
    folder.mkdir()
    for name, data in student_files(run, student.name).items():
        write_durably(folder / name, data)
    classifier = load_classifier(folder).eval()
    metadata = {
        "class_names": json.dumps(run.dataset.class_names, ensure_ascii=False),
        "input": "pixels, float32 from 0 to 1, (batch, channels, height, width)",
        "output": "logits, one per class",
        "prism_ray.run": run.name,
        "prism_ray.student": student.name,
    }
    shape = (run.dataset.channels, run.dataset.image_size, run.dataset.image_size)
    data = to_onnx(classifier, shape, metadata=metadata)
    check_onnx(data, classifier, shape, name=student.name)
    write_durably(path, data)


def to_onnx(classifier: Classifier, shape: tuple[int, int, int], *, metadata: Mapping[str, str]) -> bytes:
    """A classifier in eval mode as an ONNX model for images of `shape` (C, H, W); the same one gives the same bytes.

    Raises:
        InputError: ONNX cannot express the network, or a file of it would be too large.
    """
    images = torch.zeros(2, *shape)  # two: a batch of one would be taken for a constant
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                classifier,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        model = program.model_proto
        _strip(model)
        for key, value in sorted(metadata.items()):
            model.metadata_props.add(key=key, value=value)
        return model.SerializeToString(deterministic=True)
    except Exception as error:  # whatever tracing, decomposition, translation or protobuf make of a foreign network
        raise InputError(
            f"export.formats=onnx: {classifier.architecture} cannot be written as ONNX ({_root(error)}); "
            "leave onnx out of export.formats"
        ) from error


def check_onnx(data: bytes, classifier: Classifier, shape: tuple[int, int, int], *, name: str) -> None:
    """Refuse a model with which onnxruntime computes other logits than PyTorch, on random images.

    Raises:
        PrismError: names the largest difference.
        InputError: onnxruntime cannot run the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, one per status
        raise InputError(
            f"export.formats=onnx: onnxruntime {onnxruntime.__version__} does not load {classifier.architecture} "
            f"({_root(error)}); install a newer one, or leave onnx out of export.formats"
        ) from error
    generator = torch.Generator().manual_seed(0)
    for batch_size in BATCH_SIZES:
        images = torch.rand(batch_size, *shape, generator=generator)
        with torch.no_grad():
            expected = classifier(images)
        (found,) = session.run(None, {"images": images.numpy()})
        difference = (torch.from_numpy(found) - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise PrismError(
                f"student {name}: as ONNX its logits differ from PyTorch's by up to {difference:.3g} (accepted: "
                f"{TOLERANCE:g}); nothing was written; try another onnxruntime, or leave onnx out of export.formats"
            )


def _strip(model: Any) -> None:
    """Drop the exporter's notes: they hold source lines and paths of this machine."""
    del model.metadata_props[:]
    model.doc_string = ""
    _strip_graph(model.graph)
    for function in model.functions:
        _strip_graph(function)


def _strip_graph(graph: Any) -> None:
    entries = [graph, *graph.node, *graph.value_info]
    for part in ("input", "output", "initializer"):  # plain names in a function
        entries += [entry for entry in getattr(graph, part, ()) if not isinstance(entry, str)]
    for entry in entries:
        del entry.metadata_props[:]
        entry.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _strip_graph(nested)


def _root(error: BaseException) -> str:
    """The first cause: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shortened(error)
