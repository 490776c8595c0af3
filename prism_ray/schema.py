"""Every table: columns, types, units, version.

Images follow the Hugging Face conventions, so that `datasets.load_dataset("parquet", data_files=...)` shows pictures
and class names without code: an `image` struct of encoded bytes and a path, and a `label` with its class names in the
schema's metadata. Shards are deterministic: the same rows give the same bytes (same pyarrow version).
"""

import io
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = 1
"""Written into every table; a reader refuses a newer one."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

REAL_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("image", IMAGE),  # PNG
    ("label", pa.int64()),  # class id, index into the class names
    ("image_id", pa.string()),  # name in the source, unique within a split
]

IMAGE_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("image", IMAGE),  # PNG, lossless: an optimized image does not survive JPEG
    ("label", pa.int64()),
    ("image_id", pa.string()),  # "<class id>-<index in class>", zero-padded
    ("unit_id", pa.string()),
    ("class_name", pa.string()),
    ("index_in_class", pa.int64()),  # k, 0-based
    ("seed", pa.int64()),
    ("method", pa.string()),
    ("prompt", pa.string()),  # null where nothing was prompted
    ("source_image_id", pa.string()),  # the real image this one is or started from; null from noise
    ("primary_teacher", pa.string()),  # null for real images
    ("statistics_teachers", pa.list_(pa.string())),
    ("iterations", pa.int64()),
    ("loss_ce", pa.float64()),  # cross-entropy of the batch at its last iteration, nats; null for real images
    ("loss_bn", pa.float64()),  # statistics term of the batch at its last iteration, unweighted
    ("verifier_class", pa.int64()),  # the primary's prediction on the stored pixels
    ("verifier_confidence", pa.float64()),  # its softmax probability of `label`, 0 to 1
    ("config_hash", pa.string()),
]

LABEL_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("image_id", pa.string()),
    ("view", pa.int32()),  # 0-based
    ("logits", pa.binary()),  # little-endian, in the codec of the table's metadata
]


def image_schema(columns: Sequence[tuple[str, pa.DataType]], class_names: Sequence[str]) -> pa.Schema:
    """Schema of an image table with the metadata that makes `datasets` show images and class names."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), "prism_ray.version": str(VERSION)}
    return pa.schema(list(columns), metadata=metadata)


def label_schema(*, codec: str, num_classes: int, views_hash: str) -> pa.Schema:
    """Schema of a label table: `codec` decodes `logits`, `views_hash` pins how its views were drawn."""
    metadata = {
        "prism_ray.version": str(VERSION),
        "prism_ray.codec": codec,
        "prism_ray.num_classes": str(num_classes),
        "prism_ray.views_hash": views_hash,
    }
    return pa.schema(LABEL_COLUMNS, metadata=metadata)


def class_names_of(schema: pa.Schema) -> list[str] | None:
    """Class names of an image table, or None where its metadata has none."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    label = json.loads(text).get("info", {}).get("features", {}).get("label", {})
    return label.get("names")


def table_bytes(table: pa.Table) -> bytes:
    """The table as a parquet file in memory. Images are compressed already, so the rest decides: zstd."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=1000)
    return sink.getvalue()
