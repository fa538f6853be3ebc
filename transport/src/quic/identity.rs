//! Who the server is: certificates, their keys, and the pins by which clients know them.

use core::time::Duration;
use std::path::Path;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};

use super::provider;

/// SHA-256 of a certificate's public key (SubjectPublicKeyInfo): what a client pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin(pub [u8; 32]);

impl Pin {
    /// The pin of a certificate. Errors: what is wrong with the certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
        let digest = ring::digest::digest(&ring::digest::SHA256, parsed.subject_public_key_info().as_ref());
        let mut pin = [0; 32];
        pin.copy_from_slice(digest.as_ref());
        Ok(Self(pin))
    }

    /// Lower-case hexadecimal.
    pub fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        if bytes.len() != 64 {
            return None;
        }
        let mut pin = [0; 32];
        for (byte, pair) in pin.iter_mut().zip(bytes.chunks_exact(2)) {
            let digit = |at: usize| (pair[at] as char).to_digit(16);
            *byte = (digit(0)? << 4 | digit(1)?) as u8;
        }
        Some(Self(pin))
    }
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Identity {
    /// The chain, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key of the leaf.
    pub key: PrivateKeyDer<'static>,
}

impl Identity {
    /// A self-signed development certificate for `key` (PKCS #8 PEM): ECDSA P-256, valid for 14 days from `not_before`
    /// (seconds since the Unix epoch), for the names `localhost` and the loopback addresses.
    ///
    /// Errors: what is wrong with the key.
    pub fn self_signed(key: &str, not_before: u64) -> Result<Self, String> {
        let key = rcgen::KeyPair::from_pem(key).map_err(|error| error.to_string())?;
        let names = ["localhost", "127.0.0.1", "::1"].map(String::from).to_vec();
        let mut params = rcgen::CertificateParams::new(names).map_err(|error| error.to_string())?;
        let start = std::time::UNIX_EPOCH + Duration::from_secs(not_before);
        // An hour of slack for clients whose clock is behind, inside the 14 days that browsers accept.
        params.not_before = (start - Duration::from_secs(3600)).into();
        params.not_after = (start + Duration::from_secs(14 * 24 * 3600 - 7200)).into();
        let certificate = params.self_signed(&key).map_err(|error| error.to_string())?;
        let der = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| error.to_string())?;
        Ok(Self { chain: vec![certificate.der().clone()], key: der })
    }

    /// Reads a chain and a key from PEM files. Errors: what is wrong with which file; that the key is not the one of the certificate.
    pub fn from_pem_files(chain: &Path, key: &Path) -> Result<Self, String> {
        let file = chain;
        let at = |path: &Path, error: rustls::pki_types::pem::Error| format!("{}: {error}", path.display());
        let certificates = CertificateDer::pem_file_iter(chain).map_err(|error| at(chain, error))?;
        let chain = certificates.collect::<Result<_, _>>().map_err(|error| at(chain, error))?;
        let (path, key) = (key, PrivateKeyDer::from_pem_file(key).map_err(|error| at(key, error))?);
        let this = Self { chain, key };
        let pair = CertifiedKey::from_der(this.chain.clone(), this.key.clone_key(), &provider());
        pair.map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                format!("{} is not the key of the certificate in {}; export both again", path.display(), file.display())
            }
            error => format!("{} and {}: {error}", file.display(), path.display()),
        })?;
        Ok(this)
    }

    /// A new P-256 key, PKCS #8 PEM. Errors: the random generator failed.
    pub fn generate_key() -> Result<String, String> {
        rcgen::KeyPair::generate().map(|key| key.serialize_pem()).map_err(|error| error.to_string())
    }

    /// The pin of the leaf. Errors: the chain is empty or its leaf does not parse.
    pub fn pin(&self) -> Result<Pin, String> {
        Pin::of(self.chain.first().ok_or("the certificate chain is empty")?)
    }
}

/// Reads the certificates of a PEM file. Errors: what is wrong with the file; also if there are none.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |error: rustls::pki_types::pem::Error| format!("{}: {error}", path.display());
    let all: Vec<_> = CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    if all.is_empty() { Err(format!("{}: no certificate in it", path.display())) } else { Ok(all) }
}

/// Believes a certificate whose key has the pin, and checks that the peer holds that key.
#[derive(Debug)]
pub(super) struct PinVerifier {
    pub(super) pin: Pin,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match Pin::of(end_entity) {
            Ok(pin) if pin == self.pin => Ok(ServerCertVerified::assertion()),
            _ => Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // QUIC has no TLS 1.2.
        Err(rustls::Error::General("TLS 1.2 is not used".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
