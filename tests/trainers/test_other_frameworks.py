"""JAX, TensorFlow, and a caller with nothing but the stubs, with the lines of docs/trainers.md."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import recipes
from support.comparison import norm_error, normal, random_labels, reference_answer

from lovasz.core import LovaszSoftmax
from lovasz.server.launch import ServerProcess

pytestmark = pytest.mark.filterwarnings("default")

Lines = Callable[..., None]


@pytest.fixture(params=["inprocess", "on a server"])
def lines_at(request: pytest.FixtureRequest, ran: Callable[[str, int], None], server: ServerProcess) -> Lines:
    """Executes a block of a section in a namespace; its client's target is this process or a server."""

    def run(section: str, block: int, namespace: dict[str, Any]) -> None:
        ran(section, block)
        target = server.target if request.param == "on a server" else request.param
        recipes.run_lines(section, block, namespace, target)

    return run


def test_jax(lines_at: Lines) -> None:
    jax = pytest.importorskip("jax")
    logits, labels = normal(2, 5, 6, 7, seed=1, dtype=torch.float32), random_labels(2, 6, 7, values=5, seed=2, void=255)
    names: dict[str, Any] = {}
    lines_at("JAX", 0, names)
    criterion = names["criterion"]
    given = jax.numpy.asarray(logits.numpy()), jax.numpy.asarray(labels.numpy().astype(np.int32))
    expected, expected_grad = reference_answer(logits, labels, recipes.TERMS)
    for function in (jax.value_and_grad(criterion), jax.jit(jax.value_and_grad(criterion))):
        loss, grad = function(*given)
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert norm_error(torch.from_numpy(np.array(grad)), expected_grad) < 5e-6
    doubled = jax.grad(lambda scale: 3 * criterion(scale * given[0], given[1]))(jax.numpy.float32(1))
    assert float(doubled) == pytest.approx(3 * float((expected_grad * logits).sum()), rel=1e-4)
    assert float(jax.jit(criterion)(*given)) == pytest.approx(expected, rel=1e-6)
    halves, _ = jax.value_and_grad(criterion)(given[0].astype(jax.numpy.bfloat16), given[1])
    assert float(halves) == pytest.approx(expected, rel=1e-2)
    names["client"].close()


def test_tensorflow(lines_at: Lines) -> None:
    tf = pytest.importorskip("tensorflow")
    images, labels = recipes.batch()
    channels_last = images.movedim(1, -1).numpy()
    model = tf.keras.Sequential([tf.keras.Input((6, 8, 3)), tf.keras.layers.Conv2D(recipes.CLASSES, 1)])
    names: dict[str, Any] = {"model": model}
    lines_at("TensorFlow", 0, names)
    logits = torch.from_numpy(model(channels_last).numpy()).movedim(-1, 1)
    expected, expected_grad = reference_answer(logits, labels, recipes.TERMS)
    with tf.GradientTape() as tape:
        tape.watch(given := tf.constant(logits.movedim(1, -1).numpy()))
        loss = 2 * names["lovasz_loss"](labels.numpy(), given)
    grad = torch.from_numpy(tape.gradient(loss, given).numpy()).movedim(-1, 1)
    assert float(loss) == pytest.approx(2 * expected, rel=1e-6)
    assert norm_error(grad, 2 * expected_grad) < 5e-6
    before = torch.from_numpy(model.layers[0].bias.numpy())
    history = model.fit(channels_last, labels.numpy(), batch_size=recipes.IMAGES, epochs=1, verbose=0)
    assert history.history["loss"] == [pytest.approx(expected, rel=1e-5)]
    step = before - torch.from_numpy(model.layers[0].bias.numpy())
    assert norm_error(step, 0.01 * expected_grad.sum(dim=(0, 2, 3))) < 1e-3
    names["client"].close()


STUBS = "loss_pb2.py", "loss_pb2_grpc.py"


def test_the_stubs_alone(ran: Callable[[str, int], None], server: ServerProcess, tmp_path: Path) -> None:
    """In a process that imports nothing else of this project."""
    folder = tmp_path / "lovasz" / "v1"
    folder.mkdir(parents=True)
    for stub in STUBS:
        shutil.copy(recipes.REPOSITORY / "proto" / "lovasz" / "v1" / stub, folder)
    logits, labels = normal(2, 5, 6, 7, seed=1, dtype=torch.float32), random_labels(2, 6, 7, values=5, seed=2, void=255)
    np.savez(tmp_path / "given.npz", logits=logits.numpy(), labels=labels.numpy().astype(np.uint8))
    program = ["import numpy as np", "logits, labels = np.load('given.npz').values()"]
    for block in range(2):
        ran("Stubs alone", block)
        program += [recipes.sections()["Stubs alone"][block].replace("localhost:50051", server.target)]
        program += [f"np.savez('answer{block}.npz', loss=loss, grad=grad)"]
    program += ["import sys; print(*sorted(name for name in sys.modules if name.startswith('lovasz.')))"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["lovasz.v1", "lovasz.v1.loss_pb2", "lovasz.v1.loss_pb2_grpc"]
    expected, expected_grad = reference_answer(logits, labels, LovaszSoftmax(ignore_index=255))
    for block in range(2):
        with np.load(tmp_path / f"answer{block}.npz") as answer:
            assert float(answer["loss"]) == pytest.approx(expected, rel=1e-6)
            assert norm_error(torch.from_numpy(answer["grad"]), expected_grad) < 5e-6
