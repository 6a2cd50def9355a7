"""Streams go on from the KV blocks that the memory service of another host has."""

from pathlib import Path

from tests.integration.readers import assert_equal
from tests.integration.test_memory_resume import OPTIONS, begin, killed_in_the_middle, ways
from tests.integration.worlds import real_mesh
from tests.memory_service.processes import serving
from tests.memory_service.test_service import remote_address
from unbroken.v1 import inference_service_pb2 as pb


def test_it_goes_on_from_the_blocks_of_another_host(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("one", "other")]
    for directory in directories:
        directory.mkdir()
    one, other = (serving(directory, "--listen", "127.0.0.1:0") for directory in directories)
    with one as first, other as second:
        addresses = [remote_address(service) for service in (first, second)]
        options = [
            f"{OPTIONS} --memory {service.directory} --memory-address {address} "
            f"--memory-peers {peer}"
            for service, address, peer in zip(
                (first, second), addresses, reversed(addresses), strict=True
            )
        ]
        flags = {f"w{i + 1}": ("--engine-options", text) for i, text in enumerate(options)}
        with real_mesh(tmp_path / "mesh", num_workers=2, flags_of=flags) as world:

            async def scenario() -> None:
                seen, _ = await killed_in_the_middle(world, 4)
                assert ways(seen) == [pb.CONTINUATION_CLASS_RESTORE]
                assert_equal(seen, await begin(world, salt=4).to_the_end())
                for worker in await world.client.list_workers():
                    assert not worker.description.HasField("kv_holder"), "it has a secret"

            world.run(scenario())
