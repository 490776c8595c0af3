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

from prism_ray.documents import fits, parse_json

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
    ("energy_teachers", pa.list_(pa.string())),  # whose energies steered the sampler or chose among its samples
    ("energy", pa.float64()),  # their mean energy of the stored pixels; null where nothing was sampled
    ("iterations", pa.int64()),  # of optimization, or steps of the sampler
    ("loss_ce", pa.float64()),  # cross-entropy of the batch at its last iteration, nats; null for real images
    ("loss_bn", pa.float64()),  # statistics term of the batch at its last iteration, unweighted
    ("verifier_class", pa.int64()),  # the primary's prediction on the stored pixels
    ("verifier_confidence", pa.float64()),  # its softmax probability of `label`, 0 to 1
    ("config_hash", pa.string()),  # of the settings that decide images
]

LABEL_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("image_id", pa.string()),
    ("logits", pa.binary()),  # of the views 0, 1, ... in the codec of the table's metadata; of one fixed length
]
"""One row per image: (image_id, view) is the key of a label, and the view is its place in the blob."""

LABEL_ROW_GROUP_BYTES = 2**26


def image_schema(columns: Sequence[tuple[str, pa.DataType]], class_names: Sequence[str]) -> pa.Schema:
    """Schema of an image table with the metadata that makes `datasets` show images and class names."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), "prism_ray.version": str(VERSION)}
    return pa.schema(list(columns), metadata=metadata)


def label_schema(
    *, codec: str, blob_bytes: int, num_classes: int, num_views: int, views_hash: str, group: str
) -> pa.Schema:
    """Schema of a label table.

    Args:
        codec: how `logits` are stored, see `methods.soft_labels.Codec`.
        blob_bytes: length of every row's `logits`.
        views_hash: pins how views were drawn.
        group: id of the unit; with the number of a view it names the label group whose images were labelled together.
    """
    metadata = {
        "prism_ray.version": str(VERSION),
        "prism_ray.codec": codec,
        "prism_ray.num_classes": str(num_classes),
        "prism_ray.num_views": str(num_views),
        "prism_ray.views_hash": views_hash,
        "prism_ray.group": group,
    }
    types = {"logits": pa.binary(blob_bytes)}
    return pa.schema([(name, types.get(name, kind)) for name, kind in LABEL_COLUMNS], metadata=metadata)


def class_names_of(schema: pa.Schema) -> list[str] | None:
    """Class names of an image table, or None where its metadata has none that make sense."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = parse_json(text)["info"]["features"]["label"]["names"]
    except (ValueError, LookupError, TypeError):
        return None
    return names if fits(names, list[str]) else None


def table_bytes(table: pa.Table) -> bytes:
    """The table as a parquet file in memory. Images are compressed already, so the rest decides: zstd."""
    if "prism_ray.codec" in text_metadata(table.schema):
        return _label_bytes(table)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=1000)
    return sink.getvalue()


def text_metadata(schema: pa.Schema) -> dict[str, str]:
    """What a table says of itself."""
    entries = (schema.metadata or {}).items()
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in entries}


def _label_bytes(table: pa.Table) -> bytes:
    """A label table, in which a file's own parts would weigh: 100 images' labels may take 15,000 bytes.

    No second copy of the schema (900 bytes), no statistics of bytes that nobody filters by. Half-precision numbers
    don't shrink at a higher level of zstd, which would take 30 times as long; quantized ones do, by up to 7 %.
    """
    metadata, sink = text_metadata(table.schema), io.BytesIO()
    writer = pq.ParquetWriter(
        sink,
        table.schema.remove_metadata(),
        compression="zstd",
        compression_level=19 if "quantized" in metadata["prism_ray.codec"] else 3,
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
        data_page_size=LABEL_ROW_GROUP_BYTES,
    )
    with writer:
        row_bytes = max(1, table.nbytes // max(1, len(table)))
        rows = max(1, LABEL_ROW_GROUP_BYTES // row_bytes)
        writer.write_table(table.replace_schema_metadata(None), row_group_size=rows)
        writer.add_key_value_metadata(metadata)  # which goes with the second copy
    return sink.getvalue()
