"""The dispatcher: automatic, overridable, explains itself."""

import pytest
import torch

from apportion.cli import main
from apportion.kernels import dispatch
from apportion.kernels.dispatch import VARIABLE, backend_for, use


@pytest.fixture(autouse=True)
def nothing_is_asked_for(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_cpu_runs_torch():
    assert backend_for(torch.zeros(1)) == "torch"


def test_a_gpu_runs_triton_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    assert dispatch._choice("cuda")[0] == "triton"
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert dispatch._choice("cuda") == ("torch", "Triton is not installed")


def test_it_can_be_overruled(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    with use("triton"):
        assert backend_for(torch.zeros(1)) == "triton"
        with use("torch"):
            assert dispatch._choice("cuda")[0] == "torch"
        assert backend_for(torch.zeros(1)) == "triton"
    assert backend_for(torch.zeros(1)) == "torch"
    monkeypatch.setenv(VARIABLE, "torch")
    assert dispatch._choice("cuda") == ("torch", f"{VARIABLE} is set")
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="no 'cuda' kernels"):
        backend_for(torch.zeros(1))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"), use("triton"):
        pass


def test_other_dtypes_run_torch_in_any_case(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    with use("triton"):
        assert backend_for(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)) == "triton"
        assert backend_for(torch.zeros(1), torch.zeros(1, dtype=torch.float16)) == "torch"


def test_emulated_bfloat16_does_not_pay(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not dispatch._multiplies_bfloat16("cuda")


def test_it_explains_itself(capsys):
    assert main(["info", "--kernels"]) == 0
    told = capsys.readouterr().out
    assert "cpu: weighted sums, dot products and selection by torch" in told and "bfloat16" in told
    assert main(["info"]) == 2
    assert "Name a folder" in capsys.readouterr().err
