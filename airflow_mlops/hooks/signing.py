"""The keys with which models are signed, and whom to trust, from a connection."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import InvalidInputError

if TYPE_CHECKING:
    from airflow_mlops.provenance.signing import Signed, SigningKeys


class SigningHook(BaseHook):
    """Signs models and verifies them; see :mod:`airflow_mlops.provenance.signing` for what a signature says.

    Connection: extra ``method`` is ``key`` (if empty), ``certificate`` or ``sigstore``. The password is the private key
    as PEM text (``\\n`` for line breaks is understood), or the identity token of ``sigstore``; a connection that only
    verifies has none. Further extras, texts as PEM: ``passphrase`` of the private key, ``public_key``,
    ``certificate``, ``certificate_chain``, ``identity``, ``oidc_issuer``, ``trust_config`` (a path on the worker).
    See :class:`airflow_mlops.provenance.signing.SigningKeys` for which method needs which.

    :param signing_conn_id: connection of type ``model_signing``
    """

    conn_name_attr = "signing_conn_id"
    default_conn_name = "model_signing_default"
    conn_type = "model_signing"
    hook_name = "Model signing"

    def __init__(self, signing_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.signing_conn_id = signing_conn_id

    @cached_property
    def keys(self) -> SigningKeys:
        """What the connection says.

        :raises InvalidInputError: there is no such connection, or it has no method we know
        """
        from airflow_mlops.provenance.signing import METHODS, SigningKeys

        try:
            connection = self.get_connection(self.signing_conn_id)
        except AirflowNotFoundException:
            raise InvalidInputError(
                f"there is no connection {self.signing_conn_id!r}; create it with type model_signing and a private key "
                "(to sign) or a public one (to verify)"
            ) from None
        extra = connection.extra_dejson
        method = str(extra.get("method") or "key")
        if method not in METHODS:
            raise InvalidInputError(
                f"the extra method of the connection {self.signing_conn_id!r} is {method!r}; expected one of "
                f"{', '.join(METHODS)}"
            )
        secret = _pem(connection.password)
        return SigningKeys(
            method=method,
            private_key=None if method == "sigstore" else secret,
            identity_token=secret if method == "sigstore" else None,
            passphrase=extra.get("passphrase") or None,
            public_key=_pem(extra.get("public_key")),
            certificate=_pem(extra.get("certificate")),
            certificate_chain=_pem(extra.get("certificate_chain")),
            identity=extra.get("identity") or None,
            oidc_issuer=extra.get("oidc_issuer") or None,
            trust_config=extra.get("trust_config") or None,
        )

    def get_conn(self) -> SigningKeys:
        """The same as :attr:`keys`."""
        return self.keys

    def sign(self, folder: str | Path, model: str, run_key: str) -> Signed:
        """Sign the files of a version of the registered ``model`` that the training ``run_key`` made."""
        from airflow_mlops.provenance.signing import Subject, sign

        return sign(folder, Subject(model, run_key), self.keys)

    def verify(self, folder: str | Path, signature: bytes, model: str, run_key: str) -> Signed:
        """Check that ``folder`` holds what was signed for this model and training by whom the connection trusts."""
        from airflow_mlops.provenance.signing import Subject, verify

        return verify(folder, signature, Subject(model, run_key), self.keys)

    def test_connection(self) -> tuple[bool, str]:
        """Whether the keys can be read and fit together: signs a file of its own where there is a private key."""
        import tempfile

        from airflow_mlops.provenance.signing import fingerprint

        try:
            if self.keys.private_key:
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / "file").write_text("test")
                    signed = self.sign(folder, "test", "test")
                    self.verify(folder, signed.content, "test", "test")
                return True, f"signs and verifies as {signed.signed_by}"
            return True, f"verifies signatures of {fingerprint(self.keys)}; has no private key to sign with"
        except Exception as error:
            return False, str(error)


def _pem(text: str | None) -> str | None:
    return text.replace("\\n", "\n").strip() + "\n" if text and text.strip() else None
