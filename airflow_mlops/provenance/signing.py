"""Signatures of model folders, in the format of OpenSSF Model Signing: a Sigstore bundle around an in-toto statement.

The statement lists the SHA-256 of every file. Its subject names the registered model and the training that made the
version, so that a good signature of one model is none of another. ``model_signing verify`` reads the same file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, MlopsError
from airflow_mlops.model_files.digest import FileDigest, digest_of, file_digests

METHODS = ("key", "certificate", "sigstore")
_SCHEME = "mlflow-model"


@dataclass(frozen=True)
class Subject:
    """What a signature speaks of.

    :param model: registered model
    :param run_key: identity of the training that made the version
    """

    model: str
    run_key: str

    def __str__(self) -> str:
        return f"{_SCHEME}:{quote(self.model, safe='')}?{urlencode({'run_key': self.run_key})}"

    @classmethod
    def parse(cls, text: str) -> Subject:
        """The reverse of ``str()``.

        :raises ValueError: it is something else
        """
        parts = urlsplit(text)
        keys = parse_qs(parts.query, keep_blank_values=True).get("run_key", [])
        if parts.scheme != _SCHEME or len(keys) != 1:
            raise ValueError(f"the subject is {text!r}, no version of a registered model")
        from urllib.parse import unquote

        return cls(unquote(parts.path), keys[0])


@dataclass(frozen=True)
class SigningKeys:
    """How to sign and whom to trust. All keys and certificates are PEM text.

    :param method: ``key`` (an elliptic curve key: P-256, P-384 or P-521), ``certificate`` or ``sigstore``
    :param private_key: to sign with, of ``key`` and ``certificate``
    :param passphrase: of an encrypted private key; with ``key`` only
    :param public_key: to verify with, of ``key``; else the private key's
    :param certificate: of the signer; a verification accepts no other, unless ``identity`` says whose else
    :param certificate_chain: intermediate certificates and roots to trust
    :param identity: who must have signed: the common name or a subject alternative name of ``certificate``, the
        identity of ``sigstore``
    :param oidc_issuer: who vouches for the identity, of ``sigstore``
    :param identity_token: to sign with ``sigstore``; else the ambient credentials of the machine
    :param trust_config: path of a Sigstore trust configuration, for an instance of one's own
    """

    method: str = "key"
    private_key: str | None = field(default=None, repr=False)
    passphrase: str | None = field(default=None, repr=False)
    public_key: str | None = None
    certificate: str | None = None
    certificate_chain: str | None = None
    identity: str | None = None
    oidc_issuer: str | None = None
    identity_token: str | None = field(default=None, repr=False)
    trust_config: str | None = None


@dataclass(frozen=True)
class Signed:
    """A signature and what it says.

    :param content: the signature file
    :param digest: of the model's files, see :func:`airflow_mlops.model_files.digest.digest_of`
    :param signed_by: fingerprint of key or certificate, or the identity
    :param subject: the version it speaks of
    """

    content: bytes = field(repr=False)
    digest: str
    signed_by: str
    subject: Subject


def sign(folder: str | Path, subject: Subject, keys: SigningKeys) -> Signed:
    """Sign the files of a model, each read once.

    :raises InvalidInputError: a key is missing or unfit, the folder is no model's, or the package is not installed
    :raises ExternalSystemError: Sigstore cannot be reached
    """
    files = file_digests(folder)
    with _as_files(keys) as paths, _words("sign", folder, keys):
        from model_signing import signing

        config = signing.Config()
        if keys.method == "key":
            config.use_elliptic_key_signer(private_key=paths["private_key"], password=_bytes(keys.passphrase))
        elif keys.method == "certificate":
            config.use_certificate_signer(
                private_key=paths["private_key"],
                signing_certificate=paths["certificate"],
                certificate_chain=[paths["certificate_chain"]] if keys.certificate_chain else [],
            )
        else:
            config.use_sigstore_signer(
                identity_token=keys.identity_token,
                use_ambient_credentials=True,
                oidc_issuer=keys.oidc_issuer,
                trust_config=Path(keys.trust_config) if keys.trust_config else None,
            )
        config.set_hashing_config(_hashed(files, str(subject)))
        place = paths["folder"] / "model.sig"
        config.sign(folder, place)
        content = place.read_bytes()
    return Signed(content, digest_of(files), _signer(content, keys), subject)


def verify(folder: str | Path, signature: bytes, subject: Subject, keys: SigningKeys) -> Signed:
    """Check that ``folder`` holds exactly the files that were signed, for this model and training, by whom we trust.

    :raises InvalidInputError: a file was changed, added or removed; the signature is another model's, another
        signer's, damaged; or whom to trust is not said
    """
    files = file_digests(folder)
    with _as_files(keys, verifying=True) as paths, _words("verify", folder, keys):
        from model_signing import verifying

        place = paths["folder"] / "model.sig"
        place.write_bytes(signature)
        config = verifying.Config()
        if keys.method == "key":
            config.use_elliptic_key_verifier(public_key=paths["public_key"])
        elif keys.method == "certificate":
            config.use_certificate_verifier(certificate_chain=[paths["certificate_chain"]])
        else:
            config.use_sigstore_verifier(
                identity=str(keys.identity),
                oidc_issuer=str(keys.oidc_issuer),
                trust_config=Path(keys.trust_config) if keys.trust_config else None,
            )
        config.set_hashing_config(_hashed(files, str(subject)))
        try:
            config.verify(folder, place)
        except ValueError as error:
            if not str(error).startswith("Signature mismatch"):
                raise
            # Raised after the signature itself has held, so what it lists can be believed.
            raise InvalidInputError(
                f"the model in {folder} is not the one that was signed: {_changes(signature, files)}. Do not use these "
                "files; register the model again from its training."
            ) from None
        signed = Signed(signature, digest_of(files), _signer(signature, keys), _subject(signature))
    if keys.method == "certificate":
        _check_identity(signature, keys)
    if signed.subject != subject:
        raise InvalidInputError(
            f"the signature is that of the model {signed.subject.model!r} from the training "
            f"{signed.subject.run_key!r}, but {subject.model!r} from {subject.run_key!r} was asked for: somebody gave "
            "a version the files and the signature of another one. Point the alias to a version that was registered."
        )
    return signed


def fingerprint(keys: SigningKeys) -> str:
    """Who signs with these keys: ``key:sha256:...``, ``certificate:sha256:...`` or ``sigstore:`` and the identity.

    :raises InvalidInputError: a key is missing, damaged, or needs another passphrase
    """
    with _as_files(keys, verifying=True), _words("read", "the keys", keys):
        if keys.method == "key":
            return _key_print(_public_pem(keys))
        if keys.method == "certificate":
            return f"certificate:{keys.identity}" if not keys.certificate else _certificate_print(_leaf(keys))
    return f"sigstore:{keys.identity}"


def _hashed(files: tuple[FileDigest, ...], name: str) -> Any:
    """What has been hashed already, as model-signing's hashing configuration; no file is left out."""
    from model_signing import hashing, manifest
    from model_signing.manifest import FileManifestItem, Manifest, SerializationType

    kind = SerializationType.from_args({"method": "files", "hash_type": "sha256", "allow_symlinks": False})
    engine = manifest.hashing.Digest
    items = [
        FileManifestItem(path=PurePosixPath(file.path), digest=engine("sha256", bytes.fromhex(file.sha256)))
        for file in files
    ]

    class Hashed(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Manifest:
            return Manifest(name, items, kind)

    return Hashed()


@contextmanager
def _as_files(keys: SigningKeys, verifying: bool = False) -> Iterator[dict[str, Path]]:
    """The keys as files that only this user can read, as model-signing takes them, removed afterwards."""
    _check(keys, verifying)
    with tempfile.TemporaryDirectory(prefix="model-signing-") as folder:
        paths = {"folder": Path(folder)}
        texts = {
            # Whoever only verifies needs no secret on its disk.
            "private_key": None if verifying else keys.private_key,
            "public_key": _public_pem(keys) if verifying and keys.method == "key" else None,
            "certificate": keys.certificate,
            "certificate_chain": keys.certificate_chain,
        }
        for name, content in texts.items():
            if content:
                paths[name] = Path(folder) / name
                paths[name].touch(mode=0o600)
                paths[name].write_text(content)
        yield paths


def _check(keys: SigningKeys, verifying: bool) -> None:
    if keys.method not in METHODS:
        raise InvalidInputError(f"the signing method is {keys.method!r}; expected one of {', '.join(METHODS)}")
    needed: dict[str, bool] = {}
    if keys.method == "key":
        needed = {"a public or private key" if verifying else "a private key": bool(keys.private_key)}
        if verifying:
            needed = {"a public or private key": bool(keys.public_key or keys.private_key)}
    elif keys.method == "certificate":
        needed = {"a private key": verifying or bool(keys.private_key)}
        if verifying:
            needed["a certificate_chain to trust"] = bool(keys.certificate_chain)
            needed["a certificate or an identity"] = bool(keys.certificate or keys.identity)
        else:
            needed["a certificate"] = bool(keys.certificate)
    elif verifying:
        needed = {"an identity": bool(keys.identity), "an oidc_issuer": bool(keys.oidc_issuer)}
    if missing := [name for name, there in needed.items() if not there]:
        verb = "verify" if verifying else "sign"
        raise InvalidInputError(
            f"to {verb} with the method {keys.method!r} {' and '.join(missing)} is needed; add it to the connection"
        )


@contextmanager
def _words(verb: str, folder: str | Path, keys: SigningKeys) -> Iterator[None]:
    """What the libraries below raise, in words of ours; never with a key in them."""
    try:
        yield
    except MlopsError:
        raise
    except ImportError as error:
        raise InvalidInputError(f"signatures need: pip install 'airflow-mlops[provenance]' ({error})") from error
    except Exception as error:
        name = type(error).__name__
        if keys.method == "sigstore" and isinstance(error, OSError):
            raise ExternalSystemError(f"Sigstore cannot be reached: {name}: {error}") from error
        if name == "InvalidSignature":
            reason = "it was made with another key, or its text was changed since"
        else:
            reason = f"{name}: {error}" if str(error) else name
        if verb == "verify":
            raise InvalidInputError(
                f"the signature of the model in {folder} does not hold: {reason}. Do not use these files; register the "
                "model again from its training, or mend the connection if it names the wrong signer."
            ) from error
        raise InvalidInputError(
            f"cannot {verb} {folder} with the method {keys.method!r}: {reason}. Expected PEM text, for a key on one of "
            "the curves P-256, P-384 and P-521."
        ) from error


def _bytes(text: str | None) -> Any:
    return text.encode() if text else None


def _public_pem(keys: SigningKeys) -> str:
    if keys.public_key:
        return keys.public_key
    from cryptography.hazmat.primitives import serialization as pem

    try:
        key = pem.load_pem_private_key(str(keys.private_key).encode(), _bytes(keys.passphrase))
    except (ValueError, TypeError) as error:
        raise InvalidInputError(
            f"the private key cannot be read: {error}; expected an elliptic curve key as PEM text, with its passphrase "
            "if it has one"
        ) from error
    return key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo).decode()


def _key_print(public_pem: str) -> str:
    from cryptography.hazmat.primitives import serialization as pem

    key = pem.load_pem_public_key(public_pem.encode())
    raw = key.public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    return f"key:sha256:{hashlib.sha256(raw).hexdigest()}"


def _leaf(keys: SigningKeys) -> Any:
    from cryptography import x509

    return x509.load_pem_x509_certificate(str(keys.certificate).encode())


def _certificate_print(certificate: Any) -> str:
    from cryptography.hazmat.primitives import hashes

    return f"certificate:sha256:{certificate.fingerprint(hashes.SHA256()).hex()}"


def _signing_certificate(signature: bytes) -> Any:
    """The certificate that a bundle says it was signed with; to be believed only after the verification."""
    from cryptography import x509

    material = json.loads(signature)["verificationMaterial"]
    raw = material["x509CertificateChain"]["certificates"][0]["rawBytes"]
    return x509.load_der_x509_certificate(base64.b64decode(raw))


def _signer(signature: bytes, keys: SigningKeys) -> str:
    if keys.method == "key":
        return _key_print(_public_pem(keys))
    if keys.method == "certificate":
        return _certificate_print(_signing_certificate(signature))
    if keys.identity:
        return f"sigstore:{keys.identity}"
    from cryptography import x509

    raw = json.loads(signature)["verificationMaterial"]["certificate"]["rawBytes"]
    return f"sigstore:{', '.join(_names(x509.load_der_x509_certificate(base64.b64decode(raw))))}"


def _check_identity(signature: bytes, keys: SigningKeys) -> None:
    """Of all whom the chain vouches for, accept only the one who should sign models."""
    found = _signing_certificate(signature)
    if keys.identity:
        if keys.identity not in _names(found):
            raise InvalidInputError(
                f"the model was signed by {', '.join(_names(found))}, whom the chain vouches for; expected "
                f"{keys.identity!r}"
            )
    elif _certificate_print(found) != _certificate_print(_leaf(keys)):
        raise InvalidInputError(
            f"the model was signed with {_certificate_print(found)} of {', '.join(_names(found))}, which is not the "
            "connection's certificate; sign it again, or give the connection the signer's identity"
        )


def _names(certificate: Any) -> list[str]:
    from cryptography import x509

    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    names = [str(item.value) for item in common]
    try:
        other = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return names
    return names + [str(item.value) for item in other]


def _statement(signature: bytes) -> Any:
    """The statement inside a bundle."""
    return json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"], validate=True))


def _changes(signature: bytes, files: tuple[FileDigest, ...]) -> str:
    """How the files differ from those that a verified bundle lists."""
    signed = {item["name"]: item["digest"] for item in _statement(signature)["predicate"]["resources"]}
    found = {file.path: file.sha256 for file in files}
    lists = {
        "changed": [path for path in found if path in signed and found[path] != signed[path]],
        "added": [path for path in found if path not in signed],
        "removed": [path for path in signed if path not in found],
    }
    return "; ".join(f"{', '.join(paths[:5])} {what}" for what, paths in lists.items() if paths)


def _subject(signature: bytes) -> Subject:
    """Whom the statement inside a verified bundle speaks of."""
    try:
        (subject,) = _statement(signature)["subject"]
        return Subject.parse(str(subject["name"]))
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InvalidInputError(
            f"the signature does not say which registered model it is for ({error}); sign the version by registering it"
        ) from error
