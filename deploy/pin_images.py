"""Pins the images that Dockerfile and docker-compose.yml name, by their digests: ``make pin-images``.

A tag can be moved to another image, a digest cannot. The command asks the images' registries for the digests, by
``docker buildx imagetools inspect``; run it again to take newer images of the same tags.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

FILES = ("Dockerfile", "docker-compose.yml")
IMAGE = re.compile(
    r"^(ARG BASE=|\s+(?:BASE|image): )((?!lovasz-server)[\w./-]+:[\w.-]+)(?:@sha256:\w+)?$", re.MULTILINE
)
"""A line that names an image, but none that is built here."""


def digest_of(image: str) -> str:
    """The digest that a tag has now, for all platforms."""
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{.Manifest.Digest}}"]
    digest = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        sys.exit(f"{image}: got {digest!r}; expected a digest")
    return digest


def main() -> None:
    parser = argparse.ArgumentParser(description="Pins images by their digests.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1], help="of the two files")
    files = [parser.parse_args().folder / name for name in FILES]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    images = sorted({found[2] for text in texts.values() for found in IMAGE.finditer(text)})
    digests = {image: digest_of(image) for image in images}
    for file, text in texts.items():
        file.write_text(IMAGE.sub(lambda found: f"{found[1]}{found[2]}@{digests[found[2]]}", text), encoding="utf-8")
    for image, digest in digests.items():
        print(f"{image}@{digest}")


if __name__ == "__main__":
    main()
