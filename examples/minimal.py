"""The smallest complete training: a network of three layers, cross-entropy + Lovász-Softmax, and the IoU of a test set.

python examples/minimal.py                             # computes the loss in this process; some seconds on a CPU
python examples/minimal.py --server localhost:50051    # asks a running server for it
                             --secrets secrets         # with TLS and a token, from the files of docs/security.md
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from lovasz.client import TLS, CrossEntropy, DatasetIoU, LovaszSoftmax
from lovasz.client.torch import RemoteLoss

VOID = 255


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 2, 32, 32) of a large square, class 1, and a small one, class 2; borders are void."""
    random = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(count, 2, 32, 32, generator=random), torch.zeros(count, 32, 32, dtype=torch.long)
    for image, label in zip(images, labels, strict=True):
        for number, side in ((1, 14), (2, 4)):
            top, left = torch.randint(1, 31 - side, (2,), generator=random).tolist()
            label[top - 1 : top + side + 1, left - 1 : left + side + 1] = VOID
            label[top : top + side, left : left + side] = number
            image[number - 1, top : top + side, left : left + side] += 1
    return images, labels


def dataset_iou(model: nn.Module, criterion: RemoteLoss, images: Tensor, labels: Tensor) -> DatasetIoU:
    iou = DatasetIoU()
    with torch.no_grad():
        for batch in zip(images.split(50), labels.split(50), strict=True):
            criterion(model(batch[0]), batch[1])
            assert criterion.result is not None
            iou.add(criterion.result)
    return iou


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--server", metavar="TARGET", default="inprocess", help="HOST:PORT or unix:/path")
    parser.add_argument("--secrets", metavar="FOLDER", help="of certificates and token, as docs/security.md makes it")
    arguments = parser.parse_args()
    folder = arguments.secrets
    torch.manual_seed(0)
    criterion = RemoteLoss(
        arguments.server,
        [(1.0, CrossEntropy(ignore_index=VOID)), (1.0, LovaszSoftmax(ignore_index=VOID))],
        tls=folder and TLS(f"{folder}/ca.pem", f"{folder}/trainer.pem", f"{folder}/trainer.key"),
        token_file=folder and f"{folder}/trainer.token",
    )
    layers = [nn.Conv2d(2, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 3, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = scenes(400, seed=0)
    test = scenes(200, seed=1)
    print(f"mIoU on the test set before the training: {dataset_iou(model, criterion, *test).mean_iou:.3f}")
    for _ in range(5):
        for index in torch.randperm(len(images)).split(10):
            loss = criterion(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    iou = dataset_iou(model, criterion, *test)
    classes = ", ".join(f"{value:.3f}" for value in iou.class_iou)
    print(f"and after it: {iou.mean_iou:.3f} (background, large and small squares: {classes})")
    criterion.close()


if __name__ == "__main__":
    main()
