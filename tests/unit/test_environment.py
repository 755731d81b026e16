"""Who a process is: from torchrun, from Slurm, or alone."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.strategy.utils.environment import RankEnvironment, first_host, initialise

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29400"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4242",
    "SLURM_NODELIST": "node[003-004]",
}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_a_process_without_any_variable_is_alone():
    found = RankEnvironment.read({"PATH": "/bin", "SLURM_NTASKS": "8", "RANK": ""})
    assert found == RankEnvironment(rank=0, world_size=1, local_rank=0, source="alone")


def test_torchrun_says_who_a_process_is():
    assert RankEnvironment.read(TORCHRUN) == RankEnvironment(
        rank=5, world_size=8, local_rank=1, master_addr="node7", master_port=29400, source="torchrun"
    )


def test_slurm_says_who_a_process_is():
    assert RankEnvironment.read(SLURM) == RankEnvironment(
        rank=5, world_size=8, local_rank=1, master_addr="node003", master_port=14242, source="slurm"
    )


def test_torchrun_under_slurm_counts():
    assert RankEnvironment.read({**SLURM, "SLURM_PROCID": "1", **TORCHRUN}).source == "torchrun"


def test_under_slurm_an_address_and_a_port_of_ones_own_count():
    found = RankEnvironment.read(
        without(SLURM, "SLURM_JOB_ID", "SLURM_NODELIST") | {"MASTER_ADDR": "h", "MASTER_PORT": "9"}
    )
    assert (found.master_addr, found.master_port, found.source) == ("h", 9, "slurm")


def test_under_slurm_the_nodes_of_the_step_count_before_those_of_the_job():
    assert RankEnvironment.read({**SLURM, "SLURM_STEP_NODELIST": "b[2-3]"}).master_addr == "b2"


@given(st.integers(1, 10**9))
def test_k19_the_port_follows_from_the_job_and_is_none_that_linux_gives_away(job):
    ports = {
        RankEnvironment.read({**SLURM, "SLURM_PROCID": str(r), "SLURM_JOB_ID": str(job)}).master_port for r in (1, 7)
    }
    assert len(ports) == 1
    assert 1024 <= ports.pop() < 32768


def test_k19_two_jobs_have_two_ports():
    assert len({RankEnvironment.read({**SLURM, "SLURM_JOB_ID": str(job)}).master_port for job in range(100)}) == 100


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node[003-006,9],x1", "node003"),
        ("node[9,003-006]", "node9"),
        ("x1,node[003-006]", "x1"),
        ("a-b.c[12]", "a-b.c12"),
        ("rack[0-1]node[30-40],z", "rack0node30"),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "node[", "node[3", "node[]", "node[-3]", "]a"])
def test_a_list_that_does_not_read_as_one_is_an_error(nodes):
    with pytest.raises(ConfigError, match=r"SLURM_NODELIST=.*expected a list such as"):
        first_host(nodes)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_of_torchrun_that_is_missing_is_named(name):
    with pytest.raises(ConfigError, match=rf"set and {name} missing: start with torchrun"):
        RankEnvironment.read(without(TORCHRUN, name))


def test_an_address_alone_is_half_an_environment():
    with pytest.raises(ConfigError, match="MASTER_ADDR set and RANK, WORLD_SIZE, MASTER_PORT missing"):
        RankEnvironment.read({"MASTER_ADDR": "a"})


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_NODELIST", "SLURM_LOCALID"])
def test_a_variable_of_slurm_that_is_missing_is_named(name):
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        RankEnvironment.read(without(SLURM, name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, "RANK=8 with WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1 with WORLD_SIZE=8"),
        ({"RANK": "x"}, "RANK='x': expected an integer"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected at least 1"),
        ({"LOCAL_RANK": "6"}, "LOCAL_RANK=6 with RANK=5"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 with RANK=5"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK=4 with LOCAL_WORLD_SIZE=4"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: expected a port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: expected a port"),
    ],
)
def test_what_contradicts_itself_is_an_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        RankEnvironment.read(TORCHRUN | changes)


def test_what_contradicts_itself_under_slurm_is_named_as_slurm_names_it():
    with pytest.raises(ConfigError, match="SLURM_PROCID=9 with SLURM_NTASKS=8"):
        RankEnvironment.read({**SLURM, "SLURM_PROCID": "9"})


@pytest.mark.parametrize(("environ", "name"), [(TORCHRUN, "LOCAL_RANK"), (SLURM, "SLURM_LOCALID")])
def test_k19_the_local_rank_is_never_guessed(environ, name):
    with pytest.raises(ConfigError, match=f"{name} is missing in a world of 8: set it, or give local_rank or num_"):
        RankEnvironment.read(without(environ, name))
    assert RankEnvironment.read(without(environ, name), gpus_per_node=3).local_rank == 5 % 3
    with pytest.raises(ConfigError, match=f"{name}=1 with num_gpu_per_node=1"):
        RankEnvironment.read(environ, gpus_per_node=1)
    with pytest.raises(ConfigError, match="num_gpu_per_node=0: expected"):
        RankEnvironment.read(environ, gpus_per_node=0)


@pytest.mark.parametrize(("environ", "name"), [(TORCHRUN, "LOCAL_RANK"), (SLURM, "SLURM_LOCALID")])
def test_k24_a_local_rank_that_is_given_counts_where_no_variable_says_it(environ, name):
    assert RankEnvironment.read(environ, local_rank=3).local_rank == 1
    assert RankEnvironment.read(without(environ, name), local_rank=3).local_rank == 3
    assert RankEnvironment.read(without(environ, name), local_rank=3, gpus_per_node=4).local_rank == 3
    assert RankEnvironment.read({}, local_rank=3) == RankEnvironment(local_rank=3)
    with pytest.raises(ConfigError, match="local_rank=3 with num_gpu_per_node=2: expected a lower"):
        RankEnvironment.read(without(environ, name), local_rank=3, gpus_per_node=2)


def test_a_world_of_one_needs_no_local_rank():
    alone = without(TORCHRUN, "LOCAL_RANK") | {"RANK": "0", "WORLD_SIZE": "1"}
    assert RankEnvironment.read(alone).local_rank == 0


def test_k19_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees():
    environment = RankEnvironment.read(TORCHRUN | {"LOCAL_RANK": "2"})
    assert [environment.device_index(visible) for visible in (1, 3, 16)] == [0, 2, 2]
    with pytest.raises(ConfigError, match="local rank 2 needs its own GPU, and 2 are visible"):
        environment.device_index(2)


# -- the default group ------------------------------------------------------------------------------------------------


def test_k28_the_group_is_made_once_and_who_made_it_is_told():
    def main():
        import os

        environment = RankEnvironment.read(os.environ)
        made = [initialise(environment, "gloo"), initialise(environment, "gloo")]
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total)
        sizes = (environment.rank == dist.get_rank(), dist.get_world_size(), total.item())
        dist.destroy_process_group()
        return made, sizes

    assert SimWorld(4, gpus_per_node=2, stall_limit=15).run(main) == [([True, False], (True, 4, 6))] * 4


def test_k28_a_group_of_the_users_own_is_left_alone():
    def main():
        dist.init_process_group("gloo")
        before = dist.group.WORLD
        made = initialise(RankEnvironment(), "nccl")
        same = dist.group.WORLD is before
        dist.destroy_process_group()
        return made, same

    assert SimWorld(2, stall_limit=15).run(main) == [(False, True)] * 2


def test_slurm_variables_alone_make_a_group():
    def main():
        import os

        rank = os.environ["RANK"]
        slurm = SLURM | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "3", "SLURM_NODELIST": "h[1-2]"}
        for name in TORCHRUN:
            del os.environ[name]
        environment = RankEnvironment.read(slurm)
        made = initialise(environment, "gloo", timeout=timedelta(minutes=3))
        total = torch.tensor(environment.rank)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return made, total.item()

    assert SimWorld(3, stall_limit=15).run(main) == [(True, 3)] * 3


def test_k01_alone_a_real_group_needs_no_port_and_no_variable(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert initialise(RankEnvironment.read({}), "gloo") is True
    try:
        total = torch.tensor(3)
        dist.all_reduce(total)
        assert (total.item(), dist.get_rank(), dist.get_world_size()) == (3, 0, 1)
    finally:
        dist.destroy_process_group()


def test_a_simulated_rank_alone_has_a_group():
    def main():
        made = initialise(RankEnvironment(), "gloo")
        size = dist.get_world_size()
        dist.destroy_process_group()
        return made, size

    assert SimWorld(1, stall_limit=15).run(main) == [(True, 1)]


def test_a_cuda_device_becomes_the_current_one_and_the_group_is_bound_to_it():
    def main():
        import os

        environment = RankEnvironment.read(os.environ)
        device = torch.device("cuda", environment.device_index(torch.cuda.device_count()))
        initialise(environment, "nccl", device=device)
        found = torch.cuda.current_device(), dist.group.WORLD.bound_device_id
        dist.destroy_process_group()
        return found

    results = SimWorld(4, gpus_per_node=2, cuda=True, stall_limit=15).run(main)
    assert results == [(rank % 2, torch.device("cuda", rank % 2)) for rank in range(4)]


@pytest.mark.parametrize("timeout", [30, timedelta(0), "1h"])
def test_a_timeout_that_is_none_is_refused(timeout):
    with pytest.raises(ConfigError, match=r"expected a positive datetime.timedelta"):
        initialise(RankEnvironment(), "gloo", timeout=timeout)
