"""Hashes of models' folders."""

from cme.models import model_files


def test_any_byte_of_a_models_folder_tells_it_from_another(tmp_path):
    weights = tmp_path / "model.safetensors"
    content = bytes(2_000_000)
    weights.write_bytes(content)
    (tmp_path / "optimizer.pt").write_bytes(b"1")
    first = model_files(str(tmp_path))
    (tmp_path / "optimizer.pt").write_bytes(b"2")
    assert model_files(str(tmp_path)) == first
    for place in (0, 777_777, len(content) - 1):
        weights.write_bytes(content[:place] + b"\1" + content[place + 1 :])
        assert model_files(str(tmp_path)) != first
    weights.write_bytes(content)
    assert model_files(str(tmp_path)) == first
    assert model_files("owner/model") is None
