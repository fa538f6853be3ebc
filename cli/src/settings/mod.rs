//! What a server can be told: one file, the environment and flags, each before the one it is named behind; what is not known is refused.

mod layers;
mod quotas;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_server::auth::{Algorithm, Anchors, JwtIssuer, Keyring, SigningKey, VerifyingKey};
use mainstay_server::{Config, MAX_NAMESPACES, Quotas};
use mainstay_store_fjall::Config as StoreConfig;
use mainstay_transport::quic::{ClientCertificates, Identity, Peers};
use serde::Deserialize;

use crate::args::{self, CompactAfter};
use crate::data::{DEFAULT_NAMESPACE, Data, now};
use crate::failure::Failure;

pub(crate) use layers::Layers;
use quotas::{HandshakeSettings, PrefixSettings, SessionSettings, Setting, SubjectSettings};

/// Everything that can be set, with what it means without: `mainstay serve --print-config`.
pub(crate) const REFERENCE: &str = include_str!("reference.toml");

/// The configuration as it is written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    pub(crate) data: Option<PathBuf>,
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) admin: Option<SocketAddr>,
    users: Option<Users>,
    tls: TlsSettings,
    auth: AuthSettings,
    store: StoreSettings,
    pub(crate) log: LogSettings,
    limits: LimitSettings,
    namespaces: Vec<NamespaceSettings>,
}

/// Who the users are to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Users {
    /// Of one application, which keeps them in order itself.
    Trusted,
    /// Nobody answers for them.
    Strangers,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TlsSettings {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    client_auth: Option<ClientAuth>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ClientAuth {
    Required,
    Optional,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct AuthSettings {
    keys: Vec<String>,
    mint: Option<bool>,
    issuers: Vec<IssuerSettings>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct IssuerSettings {
    issuer: String,
    audience: String,
    algorithms: Vec<Algorithm>,
    jwks: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StoreSettings {
    reserve_bytes: Option<u64>,
    memtable_bytes: Option<u64>,
    compact_after: Option<CompactAfterSetting>,
}

/// A number of seconds, or a word.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum CompactAfterSetting {
    Seconds(f64),
    Text(String),
}

impl CompactAfterSetting {
    fn text(&self) -> String {
        match self {
            Self::Seconds(seconds) => seconds.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

/// How logs are written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LogSettings {
    pub(crate) format: Option<LogFormat>,
    pub(crate) filter: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LimitSettings {
    connections: Option<usize>,
    attachments: Option<usize>,
    producers: Option<u64>,
    memory_bytes: Option<Setting<usize>>,
    unauthenticated_secs: Option<u64>,
    hello_secs: Option<u64>,
    idle_secs: Option<u64>,
    ingest_bytes: Option<usize>,
    handshakes: HandshakeSettings,
    subject: SubjectSettings,
    session: SessionSettings,
    prefixes: Vec<PrefixSettings>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct QuotaSettings {
    subject: SubjectSettings,
    session: SessionSettings,
    prefixes: Vec<PrefixSettings>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct NamespaceSettings {
    name: String,
    #[serde(default)]
    auth: AuthSettings,
    #[serde(default)]
    limits: QuotaSettings,
}

/// One namespace as it is to be served.
#[derive(Debug)]
pub(crate) struct Namespaced {
    pub(crate) name: String,
    /// Where its store and its keys are.
    pub(crate) data: Data,
    auth: AuthSettings,
    pub(crate) quotas: Quotas,
}

/// A server that does nothing uses half as much.
const LEAST_MEMORY: usize = 64 << 20;

fn usage(what: impl Into<String>) -> Failure {
    Failure::usage(what)
}

/// Whose tokens one namespace believes.
#[derive(Debug)]
pub(crate) struct Believed {
    keys: Vec<VerifyingKey>,
    issuers: Vec<Arc<JwtIssuer>>,
}

impl Settings {
    /// The data directory.
    pub(crate) fn data(&self) -> Result<Data, Failure> {
        Data::new(self.data.as_deref())
    }

    /// How the store is opened.
    pub(crate) fn store(&self) -> StoreConfig {
        let mut config = StoreConfig::default();
        if let Some(reserve) = self.store.reserve_bytes {
            config.reserve = reserve;
        }
        if let Some(memtable) = self.store.memtable_bytes {
            config.memtable_bytes = memtable;
        }
        config
    }

    /// What the server is told. `dev`: its users are taken for trusted ones unless something else is said.
    pub(crate) fn server(&self, dev: bool) -> Result<Config, Failure> {
        if let Some(filter) = &self.log.filter {
            let read = tracing_subscriber::EnvFilter::try_new(filter);
            read.map_err(|error| usage(format!("log.filter = {filter:?} is not a filter: {error}")))?;
        }
        let mut config = Config::default();
        let limits = &self.limits;
        let seconds = |secs: Option<u64>, default| secs.map_or(default, Duration::from_secs);
        config.connections = limits.connections.unwrap_or(config.connections);
        config.attachments = limits.attachments.unwrap_or(config.attachments);
        config.producers = limits.producers.unwrap_or(config.producers);
        config.unauthenticated = seconds(limits.unauthenticated_secs, config.unauthenticated);
        config.hello_timeout = seconds(limits.hello_secs, config.hello_timeout);
        config.idle_timeout = seconds(limits.idle_secs, config.idle_timeout);
        config.ingest_budget = limits.ingest_bytes.unwrap_or(config.ingest_budget);
        config.memory = match &limits.memory_bytes {
            Some(set) => set.0,
            None => crate::memory::of_machine().map(|bytes| bytes / 4 * 3),
        };
        if let Some(set) = &self.store.compact_after {
            let CompactAfter(after) =
                args::compact_after(&set.text()).map_err(|error| usage(format!("[store] compact_after: {error}")))?;
            config.compact_after = after;
        }
        let memtable = self.store().memtable_bytes;
        for (name, is_none) in [
            ("store.memtable_bytes", memtable < 64 << 10),
            ("limits.memory_bytes", matches!(limits.memory_bytes, Some(Setting(Some(bytes))) if bytes < LEAST_MEMORY)),
            ("limits.connections", config.connections == 0),
            ("limits.attachments", config.attachments == 0),
            ("limits.producers", config.producers == 0),
            ("limits.ingest_bytes", config.ingest_budget < mainstay_protocol::registry::MAX_BATCH_BYTES),
            ("limits.idle_secs", config.idle_timeout.is_zero()),
            ("limits.hello_secs", config.hello_timeout.is_zero()),
            ("limits.unauthenticated_secs", config.unauthenticated.is_zero()),
        ] {
            if is_none {
                return Err(usage(format!("{name} is too small for anything to be done")));
            }
        }
        const DAY: Duration = Duration::from_secs(86_400);
        for (name, is_much, most) in [
            // The journal holds it until it is written, and at most twice as much.
            ("store.memtable_bytes", memtable > 64 << 20, "67108864"),
            ("store.reserve_bytes", self.store().reserve > 1 << 44, "17592186044416"),
            ("limits.connections", config.connections > 1 << 20, "1048576"),
            ("limits.attachments", config.attachments > 1 << 16, "65536"),
            ("limits.producers", config.producers > 1 << 12, "4096"),
            ("limits.ingest_bytes", config.ingest_budget > 1 << 31, "2147483648"),
            ("limits.idle_secs", config.idle_timeout > DAY, "86400"),
            ("limits.hello_secs", config.hello_timeout > DAY, "86400"),
            ("limits.unauthenticated_secs", config.unauthenticated > DAY, "86400"),
        ] {
            if is_much {
                return Err(usage(format!("{name} is at most {most}")));
            }
        }
        config.quotas = self.quotas(dev, &limits.subject, &limits.session, &limits.prefixes)?;
        if config.quotas.subject.connections == 0 {
            return Err(usage("limits.subject.connections is too small for anything to be done"));
        }
        Ok(config)
    }

    fn quotas(
        &self,
        dev: bool,
        subject: &SubjectSettings,
        session: &SessionSettings,
        prefixes: &[PrefixSettings],
    ) -> Result<Quotas, Failure> {
        let users = self.users.unwrap_or(if dev { Users::Trusted } else { Users::Strangers });
        let mut quotas = if users == Users::Trusted { Quotas::default() } else { Quotas::public() };
        subject.apply(&mut quotas.subject).map_err(usage)?;
        session.apply(&mut quotas.session).map_err(usage)?;
        quotas.prefixes = prefixes.iter().map(PrefixSettings::quotas).collect::<Result<_, _>>().map_err(usage)?;
        let mut seen = BTreeSet::new();
        if let Some(twice) = quotas.prefixes.iter().find(|one| !seen.insert(&one.prefix)) {
            return Err(usage(format!("limits.prefixes has two entries for {:?}", twice.prefix)));
        }
        Ok(quotas)
    }

    /// Every namespace, the default one first.
    pub(crate) fn namespaces(&self, dev: bool) -> Result<Vec<Namespaced>, Failure> {
        if self.namespaces.len() >= MAX_NAMESPACES {
            return Err(usage(format!("at most {MAX_NAMESPACES} namespaces are served by one process")));
        }
        let data = self.data()?;
        let quotas = self.server(dev)?.quotas;
        let mut all =
            vec![Namespaced { name: DEFAULT_NAMESPACE.into(), data: data.clone(), auth: self.auth.clone(), quotas }];
        for NamespaceSettings { name, auth, limits } in &self.namespaces {
            if all.iter().any(|other| other.name == *name) {
                return Err(usage(format!("two namespaces are called {name:?}")));
            }
            let quotas = self.quotas(dev, &limits.subject, &limits.session, &limits.prefixes)?;
            all.push(Namespaced { name: name.clone(), data: data.namespace(name)?, auth: auth.clone(), quotas });
        }
        Ok(all)
    }

    /// Whose tokens each namespace believes. A development server has a key of its own, which is not there before its first start. Makes
    /// nothing. Errors: a key or an issuer that cannot be read, one that two namespaces have, or a namespace that has none.
    pub(crate) fn believed(
        namespaces: &[Namespaced],
        dev: bool,
        key: Option<&SigningKey>,
    ) -> Result<Vec<Believed>, Failure> {
        let mut seen: Vec<(String, &str)> = Vec::new();
        let mut all = Vec::new();
        for Namespaced { name, auth, .. } in namespaces {
            let of = |what: String| usage(format!("namespace {name}: {what}"));
            let mut keys = Vec::new();
            for text in &auth.keys {
                keys.push(VerifyingKey::from_paserk(text).map_err(of)?);
            }
            let has_own = dev && name == DEFAULT_NAMESPACE;
            if has_own {
                keys.extend(key.map(SigningKey::verifying_key));
            }
            for key in &keys {
                if let Some((_, other)) = seen.iter().find(|(id, other)| *id == key.id() && other != name) {
                    return Err(of(format!("its key {} is one of namespace {other} too", key.id())));
                }
                seen.push((key.id(), name));
            }
            let mut issuers = Vec::new();
            for IssuerSettings { issuer, audience, algorithms, jwks } in &auth.issuers {
                let set = std::fs::read(jwks).map_err(|error| of(format!("{}: {error}", jwks.display())))?;
                let read = JwtIssuer::new(issuer.clone(), audience.clone(), algorithms, &set);
                issuers.push(Arc::new(read.map_err(|error| of(format!("{}: {error}", jwks.display())))?));
                let id = format!("{issuer} for {audience}");
                if let Some((_, other)) = seen.iter().find(|(known, _)| *known == id) {
                    return Err(of(format!("the issuer {id} is one of namespace {other} too")));
                }
                seen.push((id, name));
            }
            if keys.is_empty() && issuers.is_empty() && !has_own {
                return Err(of(
                    "no key to verify tokens with: use --dev, or list verification keys under [auth] keys in \
                               --config (make one with `mainstay token keygen`), or issuers of JWTs"
                        .into(),
                ));
            }
            all.push(Believed { keys, issuers });
        }
        Ok(all)
    }

    /// Whom each namespace believes. Makes the keys that are missing. Errors: those of [`Settings::believed`], and revocations that cannot be
    /// read.
    pub(crate) fn anchors(&self, namespaces: &[Namespaced], dev: Option<&SigningKey>) -> Result<Vec<Anchors>, Failure> {
        let mut all = Vec::new();
        let believed = Self::believed(namespaces, dev.is_some(), dev)?;
        for (Namespaced { data, auth, .. }, Believed { keys, issuers }) in namespaces.iter().zip(believed) {
            let mut anchors = Anchors::new(Keyring::new(keys));
            anchors.issuers = issuers;
            anchors.revoked = data.revocations()?;
            if auth.mint.unwrap_or(true) {
                // Of a namespace that is new there is none yet.
                data.create()?;
                anchors = anchors.minting_with(data.minting_key()?);
            }
            all.push(anchors);
        }
        Ok(all)
    }

    /// The certificate that is shown. Errors: there is none, or it cannot be read.
    pub(crate) fn identity(&self, dev: bool, data: &Data) -> Result<Identity, Failure> {
        match (&self.tls.cert, &self.tls.key) {
            (Some(cert), Some(key)) => Identity::from_pem_files(cert, key).map_err(usage),
            (None, None) if dev => Identity::self_signed(&data.tls_key()?, now().unsigned_abs()).map_err(|error| {
                let path = data.tls_key_file();
                Failure::integrity(format!("{} is not the key that was written to it: {error}", path.display()))
            }),
            (None, None) => Err(usage("no certificate: use --dev, or set cert and key under [tls] in --config")),
            _ => Err(usage("[tls] needs both cert and key")),
        }
    }

    /// The file of the certificate, and that of its key.
    pub(crate) fn identity_pair(&self) -> (Option<&Path>, Option<&Path>) {
        (self.tls.cert.as_deref(), self.tls.key.as_deref())
    }

    /// The files of the certificate, to be watched.
    pub(crate) fn identity_files(&self) -> Vec<&Path> {
        [&self.tls.cert, &self.tls.key].into_iter().flatten().map(PathBuf::as_path).collect()
    }

    /// Whom the server takes. Errors: certificates that cannot be read, handshakes that are too few or too many.
    pub(crate) fn peers(&self) -> Result<Peers, Failure> {
        let admission = self.limits.handshakes.admission().map_err(usage)?;
        Ok(Peers { certificates: self.client_certificates()?, admission })
    }

    /// Whose certificates clients have to show.
    fn client_certificates(&self) -> Result<Option<ClientCertificates>, Failure> {
        match (&self.tls.client_ca, self.tls.client_auth) {
            (None, None) => Ok(None),
            (None, Some(_)) => {
                Err(usage("[tls] client_auth needs client_ca: who may have signed the clients' certificates"))
            }
            (Some(path), auth) => {
                let roots = mainstay_transport::quic::read_certificates(path).map_err(usage)?;
                Ok(Some(ClientCertificates { roots, required: auth != Some(ClientAuth::Optional) }))
            }
        }
    }
}
