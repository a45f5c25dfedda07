"""The generated stubs."""

from __future__ import annotations

from support.processes import run_python


def test_the_stubs_import_without_a_warning_and_carry_the_contract() -> None:
    code = (
        "from lovasz.v1 import loss_pb2, loss_pb2_grpc\n"
        "service = loss_pb2.DESCRIPTOR.services_by_name['LossService']\n"
        "print(service.full_name, *sorted(method.name for method in service.methods))\n"
        "assert all(hasattr(loss_pb2_grpc.LossServiceServicer, method.name) for method in service.methods)"
    )
    assert run_python(code) == "lovasz.v1.LossService AbortStep Compute ComputeStream GetServerInfo LeaveRun"
