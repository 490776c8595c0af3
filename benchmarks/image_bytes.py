"""Size of image shards, and of what a run says of them, beside a folder of the same images as PNG files.

    python benchmarks/image_bytes.py [--cells digits fashion_mnist imagenet_lite] [--images 10 100 1000]

Shards of as many images of a recipe's size, smooth with some noise, and their files. Prints a JSON line per cell and
number: bytes of an image as a file and in the shard, `shard_over_files`, and the shares of a receipt and of an entry of
the manifest in the shard. A file system's own blocks, which take up to 4 KiB more for every file, do not count.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prism_ray.data.imagenet_names import class_names
from prism_ray.ledger import Receipt
from prism_ray.runs import LISTED
from prism_ray.storage import to_json

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.measuring import SIZES, drawn_pngs, image_shard  # noqa: E402  # found through the line above


def measure(recipe: str, *, num_images: int) -> dict[str, Any]:
    side, channels, num_classes = SIZES[recipe]
    names = class_names() if num_classes == 1000 else [str(n) for n in range(num_classes)]
    pngs = drawn_pngs(num_images, side=side, channels=channels, generator=torch.Generator().manual_seed(0))
    class_ids = [n % num_classes for n in range(num_images)]
    ids = [f"{class_id:06d}-{n // num_classes:06d}" for n, class_id in enumerate(class_ids)]
    shard = image_shard(pngs, class_ids, ids, names)
    receipt = Receipt(
        stage="synthesize",
        name="train-00000-of-00001",
        unit_id="0" * 16,
        key="images/train-00000-of-00001.parquet",
        rows=num_images,
        bytes=len(shard),
        sha256="0" * 64,
    )
    as_files = sum(map(len, pngs))
    return {
        "cell": recipe,
        "pixels": side,
        "images": num_images,
        "bytes_of_file": round(as_files / num_images, 1),
        "bytes_in_shard": round(len(shard) / num_images, 1),
        "shard_over_files": round(len(shard) / as_files, 4),
        "receipt_share": round(len(to_json(asdict(receipt))) / len(shard), 5),
        "manifest_share": round(len(to_json({key: getattr(receipt, key) for key in LISTED})) / len(shard), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--images", nargs="+", type=int, default=[10, 100, 1000], help="of a shard")
    options = parser.parse_args()
    for name in options.cells:
        for num_images in options.images:
            print(json.dumps(measure(name, num_images=num_images)), flush=True)


if __name__ == "__main__":
    main()
