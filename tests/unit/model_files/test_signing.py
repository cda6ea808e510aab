"""A signature holds for exactly the files, the model, the training and the signer that it was made for."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import json
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.model_files.digest import model_digest
from airflow_mlops.provenance.signing import SigningKeys, Subject, fingerprint, sign, verify

SUBJECT = Subject("sales/late & co", "run/2013?x=1")


def pem_of(key, passphrase: bytes | None = None) -> str:
    lock = pem.BestAvailableEncryption(passphrase) if passphrase else pem.NoEncryption()
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock).decode()


def public_of(private: str) -> str:
    key = pem.load_pem_private_key(private.encode(), None).public_key()
    return key.public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.fixture
def keys(private_key) -> SigningKeys:
    return SigningKeys(private_key=private_key)


class Authority:
    """A root, and certificates it issues."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root = self._issue("root", self.key, True)

    def _issue(self, name: str, key, authority: bool) -> x509.Certificate:
        now = dt.datetime(2026, 1, 1)
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + dt.timedelta(days=3650))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False), True
            )
        )
        return builder.sign(self.key, hashes.SHA256())

    def keys(self, name: str, **changes: object) -> SigningKeys:
        key = ec.generate_private_key(ec.SECP384R1())
        certificate, root = (
            c.public_bytes(pem.Encoding.PEM).decode() for c in (self._issue(name, key, False), self.root)
        )
        base = SigningKeys("certificate", pem_of(key), certificate=certificate, certificate_chain=root)
        return dataclasses.replace(base, **changes)


class TestHolds:
    def test_for_what_was_signed_wherever_it_lies(self, model, keys):
        signed = sign(model(), SUBJECT, keys)
        found = verify(model(name="elsewhere"), signed.content, SUBJECT, keys)
        assert found == signed
        assert signed.digest == model_digest(model(name="third"))
        assert signed.subject == SUBJECT
        assert signed.signed_by == fingerprint(keys)

    def test_with_the_public_key_alone_and_with_an_encrypted_private_one(self, model):
        key = ec.generate_private_key(ec.SECP521R1())
        locked = SigningKeys(private_key=pem_of(key, b"secret"), passphrase="secret")
        signed = sign(model(), SUBJECT, locked)
        assert verify(model(name="b"), signed.content, SUBJECT, SigningKeys(public_key=public_of(pem_of(key))))
        assert verify(model(name="c"), signed.content, SUBJECT, locked).signed_by == signed.signed_by

    def test_for_the_command_of_model_signing_itself(self, model, keys, tmp_path):
        folder = model()
        (tmp_path / "model.sig").write_bytes(sign(folder, SUBJECT, keys).content)
        (tmp_path / "key.pub").write_text(public_of(keys.private_key))
        command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
        options = ["--signature", str(tmp_path / "model.sig"), "--public_key", str(tmp_path / "key.pub")]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (folder / "added.txt").write_text("x")
        assert subprocess.run([*command, *options], capture_output=True).returncode != 0

    def test_for_the_owner_of_a_certificate_and_for_a_named_one(self, model):
        authority = Authority()
        keys = authority.keys("model-builder")
        signed = sign(model(), SUBJECT, keys)
        assert verify(model(name="b"), signed.content, SUBJECT, keys).signed_by == fingerprint(keys)
        named = SigningKeys("certificate", certificate_chain=keys.certificate_chain, identity="model-builder")
        assert verify(model(name="c"), signed.content, SUBJECT, named).signed_by == fingerprint(keys)


class TestBreaks:
    @pytest.fixture
    def refused(self, model, keys):
        """``refused(spoil, match)``: a copy spoiled after it was signed does not verify."""
        content = sign(model(), SUBJECT, keys).content

        def check(spoil, match):
            folder = model(name="spoiled")
            spoil(folder)
            with pytest.raises(InvalidInputError, match=match):
                verify(folder, content, SUBJECT, keys)

        return check

    def test_a_changed_file(self, refused):
        def flip(folder):
            content = bytearray((folder / "model.ubj").read_bytes())
            content[-5] ^= 1
            (folder / "model.ubj").write_bytes(content)

        refused(flip, r"not the one that was signed: model\.ubj changed")

    @pytest.mark.parametrize("name", ["extra.txt", ".gitattributes", ".git/hooks", "deep/er/file"])
    def test_an_added_file(self, refused, name):
        def add(folder):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")

        refused(add, f"{name} added")

    def test_a_removed_file(self, refused):
        refused(lambda folder: (folder / "requirements.txt").unlink(), r"requirements\.txt removed")

    def test_two_files_with_each_other_s_names(self, refused):
        def swap(folder):
            (folder / "model.ubj").rename(folder / "t")
            (folder / "conda.yaml").rename(folder / "model.ubj")
            (folder / "t").rename(folder / "conda.yaml")

        refused(swap, r"conda\.yaml, model\.ubj changed")

    def test_a_link(self, refused, tmp_path):
        (tmp_path / "same").write_text("x")

        def link(folder):
            (folder / "conda.yaml").rename(tmp_path / "moved")
            (folder / "conda.yaml").symlink_to(tmp_path / "moved")

        refused(link, r"conda\.yaml .* is a symbolic link")

    @pytest.mark.parametrize("other", [Subject("other", SUBJECT.run_key), Subject(SUBJECT.model, "run/2014")])
    def test_another_model_or_training(self, model, keys, other):
        content = sign(model(), other, keys).content
        with pytest.raises(InvalidInputError, match=f"is that of the model '{other.model}' from the training"):
            verify(model(name="b"), content, SUBJECT, keys)

    def test_another_key(self, model, keys):
        other = SigningKeys(private_key=pem_of(ec.generate_private_key(ec.SECP256R1())))
        content = sign(model(), SUBJECT, other).content
        with pytest.raises(InvalidInputError, match=r"does not hold.*does not match"):
            verify(model(name="b"), content, SUBJECT, keys)

    def test_a_statement_changed_under_the_signature(self, model, keys):
        content = json.loads(sign(model(), SUBJECT, keys).content)
        statement = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
        statement["subject"][0]["name"] = str(Subject("other", "run"))
        content["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
        with pytest.raises(InvalidInputError, match="made with another key, or its text was changed"):
            verify(model(name="b"), json.dumps(content).encode(), Subject("other", "run"), keys)

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[]", b'{"verificationMaterial": {}}'])
    def test_a_damaged_signature(self, model, keys, content):
        with pytest.raises(InvalidInputError, match="does not hold"):
            verify(model(), content, SUBJECT, keys)

    def test_a_signature_that_names_no_version(self, model, keys, tmp_path):
        from model_signing import signing

        (tmp_path / "key").write_text(keys.private_key)
        folder = model()
        config = signing.Config().use_elliptic_key_signer(private_key=tmp_path / "key")
        config._hashing_config.set_ignored_paths(paths=[], ignore_git_paths=False)
        config.sign(folder, tmp_path / "foreign.sig")
        with pytest.raises(InvalidInputError, match="does not say which registered model"):
            verify(folder, (tmp_path / "foreign.sig").read_bytes(), SUBJECT, keys)

    def test_somebody_else_of_the_same_authority(self, model):
        authority = Authority()
        ours, theirs = authority.keys("model-builder"), authority.keys("web-server")
        content = sign(model(), SUBJECT, theirs).content
        with pytest.raises(InvalidInputError, match="web-server, which is not the connection's certificate"):
            verify(model(name="b"), content, SUBJECT, ours)
        with pytest.raises(InvalidInputError, match=r"signed by web-server.*expected 'model-builder'"):
            verify(model(name="c"), content, SUBJECT, dataclasses.replace(ours, identity="model-builder"))

    def test_a_certificate_of_an_unknown_authority(self, model):
        ours, theirs = Authority().keys("model-builder"), Authority().keys("model-builder")
        content = sign(model(), SUBJECT, theirs).content
        with pytest.raises(InvalidInputError, match="does not hold"):
            verify(model(name="b"), content, SUBJECT, ours)


class TestKeys:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "rsa"}, "signing method is 'rsa'"),
            ({"private_key": None}, "a private key is needed"),
            ({"private_key": "no key"}, "cannot be read|cannot sign"),
            ({"method": "certificate"}, "a certificate is needed"),
        ],
    )
    def test_what_cannot_sign(self, model, keys, change, message):
        with pytest.raises(InvalidInputError, match=message):
            sign(model(), SUBJECT, dataclasses.replace(keys, **change))

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            (SigningKeys(), "a public or private key is needed"),
            (SigningKeys("certificate"), "certificate_chain to trust and a certificate or an identity"),
            (SigningKeys("sigstore"), "an identity and an oidc_issuer"),
        ],
    )
    def test_nobody_to_trust_is_not_everybody(self, model, keys, message):
        with pytest.raises(InvalidInputError, match=message):
            verify(model(), b"{}", SUBJECT, keys)

    def test_a_curve_that_is_not_signed_with(self, model):
        keys = SigningKeys(private_key=pem_of(ec.generate_private_key(ec.SECP256K1())))
        with pytest.raises(InvalidInputError, match="P-256, P-384 and P-521"):
            sign(model(), SUBJECT, keys)

    def test_no_secret_is_shown(self, keys):
        assert "PRIVATE" not in repr(dataclasses.replace(keys, passphrase="PRIVATE-too", identity_token="PRIVATE"))

    def test_a_wrong_passphrase_is_not_in_the_message(self, model):
        key = pem_of(ec.generate_private_key(ec.SECP256R1()), b"secret")
        with pytest.raises(InvalidInputError) as caught:
            sign(model(), SUBJECT, SigningKeys(private_key=key, passphrase="guessed"))
        assert "guessed" not in str(caught.value) and "BEGIN" not in str(caught.value)
