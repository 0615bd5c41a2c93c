"""The mesh does what its services file says, on the real kernel, in every release."""

from __future__ import annotations

import pytest

from tests.meshd.labmesh import A, A6, B, VIP, VIP6, Mesh, denied, service

RELEASES = pytest.mark.parametrize("release", [1, 2, 3])


@RELEASES
def test_a_connection_to_the_service_address_reaches_a_backend(mesh: Mesh, release: int) -> None:
    assert mesh.start(release)["start_type"] == "normal"
    assert mesh.connect(VIP)["answers"] == {A: 1}
    assert mesh.connect(VIP6)["answers"] == {A6: 1}
    assert mesh.connect(f"::ffff:{VIP}")["answers"] == {A: 1}, "an IPv6 socket may connect to an IPv4 service"
