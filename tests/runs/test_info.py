import torch

from cliptune.results import RunInfo
from cliptune.runs.info import command_line, run_info


def test_run_info_says_versions_machine_and_model() -> None:
    info = run_info(
        command=command_line("train.py", ["--data_dir", "my data"]),
        device=torch.device("cpu"),
        precision="fp32",
        world_size=2,
        model_name="RN50",
        model_settings={"embed_dim": 1024},
    )
    assert info.versions["torch"] == torch.__version__.partition("+")[0]
    assert info.command == "train.py --data_dir 'my data'"
    assert info.device == "cpu"
    assert info.device_name
    assert RunInfo.model_validate(info.model_dump(mode="json")) == info
