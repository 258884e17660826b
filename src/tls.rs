//! TLS from PEM files, for the API's listener and for who calls it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::reload::Reloaded;

/// Why files make no TLS.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// A file cannot be read, or has nothing of what it is for.
    #[error("{} is not a PEM file with a {what}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What it is for.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: pem::Error,
    },
    /// A certificate that is no authority's.
    #[error("{} has a certificate that nobody can be told by", .0.display())]
    Authority(PathBuf, #[source] rustls::Error),
    /// No authority among them.
    #[error("{} has no certificate that callers can be told by", .0.display())]
    Callers(PathBuf, #[source] VerifierBuilderError),
    /// Certificate and key do not go together, or are of a kind that is not known.
    #[error("the certificate in {} cannot be used with the key in {}", .certificate.display(), .key.display())]
    Identity {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
}

/// A certificate, with those that vouch for it behind it, and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The PEM file of the certificates.
    pub certificate: PathBuf,
    /// The PEM file of the key.
    pub key: PathBuf,
}

/// What the API's TLS is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFiles {
    /// Who the service is.
    pub identity: Identity,
    /// The PEM file of the authorities whose certificates callers must have; without it they need none.
    pub callers: Option<PathBuf>,
}

/// What a caller's TLS is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    /// The PEM file of the authorities that the service's certificate must be of.
    pub authority: PathBuf,
    /// Who the caller is, where the service asks for that.
    pub identity: Option<Identity>,
}

/// The TLS of a listener, as its files are now.
pub type Server = Reloaded<Arc<ServerConfig>, Unfit>;

impl ServerFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// Where one of them cannot be used.
    pub fn load(self) -> Result<Server, Unfit> {
        let Identity { certificate, key } = &self.identity;
        let files = [Some(certificate), Some(key), self.callers.as_ref()].into_iter().flatten().cloned();
        Reloaded::new("the TLS of the API", files.collect(), move || self.read())
    }

    fn read(&self) -> Result<Arc<ServerConfig>, Unfit> {
        let Identity { certificate, key } = &self.identity;
        let builder = ServerConfig::builder();
        let builder = match &self.callers {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let verifier = WebPkiClientVerifier::builder(Arc::new(roots(path)?)).build();
                let unfit = |source| Unfit::Callers(path.clone(), source);
                builder.with_client_cert_verifier(verifier.map_err(unfit)?)
            }
        };
        let made = builder.with_single_cert(certificates(certificate)?, private_key(key)?);
        let mut config = made.map_err(|source| self.identity.unfit(source))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl ClientFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// Where one of them cannot be used.
    pub fn read(&self) -> Result<ClientConfig, Unfit> {
        let builder = ClientConfig::builder().with_root_certificates(roots(&self.authority)?);
        let Some(identity) = &self.identity else { return Ok(builder.with_no_client_auth()) };
        let Identity { certificate, key } = identity;
        let made = builder.with_client_auth_cert(certificates(certificate)?, private_key(key)?);
        made.map_err(|source| identity.unfit(source))
    }
}

impl Identity {
    fn unfit(&self, source: rustls::Error) -> Unfit {
        Unfit::Identity { certificate: self.certificate.clone(), key: self.key.clone(), source }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Unfit> {
    let unfit = |source| Unfit::File { path: path.to_owned(), what: "certificate", source };
    let found = CertificateDer::pem_file_iter(path).map_err(unfit)?;
    let found = found.collect::<Result<Vec<_>, _>>().map_err(unfit)?;
    if found.is_empty() { Err(unfit(pem::Error::NoItemsFound)) } else { Ok(found) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Unfit> {
    let unfit = |source| Unfit::File { path: path.to_owned(), what: "private key", source };
    PrivateKeyDer::from_pem_file(path).map_err(unfit)
}

fn roots(path: &Path) -> Result<RootCertStore, Unfit> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|source| Unfit::Authority(path.to_owned(), source))?;
    }
    Ok(roots)
}
