//! The data directory: where things are, and the secrets in it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mainstay_client::{Client, ClientError, Config, ConnectFile, PathEvent};
use mainstay_server::ResumeKeys;
use mainstay_server::auth::{Revocations, SigningKey};
use mainstay_transport::quic::{Identity, ServerKeys};

use crate::failure::{About as _, Failure};
use crate::output::Output;

/// Seconds since the Unix epoch.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// A data directory.
#[derive(Debug, Clone)]
pub(crate) struct Data {
    dir: PathBuf,
}

/// The name of the namespace that is there without being configured.
pub(crate) const DEFAULT_NAMESPACE: &str = "default";

impl Data {
    /// The directory given, else the one that the environment names, else the per-user default.
    pub(crate) fn new(dir: Option<&Path>) -> Result<Self, Failure> {
        let dir = match dir {
            Some(dir) if dir.as_os_str().is_empty() => return Err(Failure::usage("the data directory has no name")),
            Some(dir) => dir.to_owned(),
            None => default_dir()?,
        };
        Ok(Self { dir })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Errors: usage, where there is no such directory.
    pub(crate) fn must_exist(&self) -> Result<(), Failure> {
        let dir = self.dir.display();
        match self.dir.try_exists() {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err(Failure::usage(format!("{dir} does not exist; name the server's data directory with --data")))
            }
            Err(error) => Err(Failure::io(dir, &error)),
        }
    }

    /// The data directory of a namespace of this server. Errors: no namespace can have this name.
    pub(crate) fn namespace(&self, name: &str) -> Result<Self, Failure> {
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        match name {
            DEFAULT_NAMESPACE => Ok(self.clone()),
            _ if !name.is_empty() && name.len() <= 64 && name.chars().all(is_word) => {
                Ok(Self { dir: self.dir.join("namespaces").join(name) })
            }
            _ => Err(Failure::usage(format!("namespace {name:?}: a name is up to 64 of a to z, 0 to 9 and -"))),
        }
    }

    /// What was revoked (spec AUTH-8).
    pub(crate) fn revocations_file(&self) -> PathBuf {
        self.dir.join("revoked.json")
    }

    /// How the file of what was revoked is known again (spec AUTH-8): it may be missing, damaged or older than the last one that was kept, and
    /// nothing in it would say so.
    fn revocations_witness(&self) -> PathBuf {
        self.dir.join("revoked.witness")
    }

    /// What was revoked. Errors: the file cannot be read, or is not the one that was kept last: a server that started with it would believe what
    /// it must not.
    pub(crate) fn revocations(&self) -> Result<Revocations, Failure> {
        let (path, witness) = (self.revocations_file(), self.revocations_witness());
        let there = |path: &Path| if_there(fs::read(path)).map_err(|error| Failure::io(path.display(), &error));
        let (text, known) = (there(&path)?, there(&witness)?);
        let name = name_of(text.as_deref());
        if known.is_some_and(|known| known.split(|byte| *byte == b'\n').all(|known| known != name.as_bytes())) {
            return Err(Failure::integrity(format!(
                "{} is not what was kept last, so that what was revoked might be believed; restore it from a copy, or remove {} to take it as it is",
                path.display(),
                witness.display()
            )));
        }
        let Some(text) = text else { return Ok(Revocations::default()) };
        serde_json::from_slice(&text)
            .map_err(|error| Failure::integrity(format!("{}: {error}; restore it from a copy", path.display())))
    }

    /// Keeps what was revoked.
    pub(crate) fn write_revocations(&self, revocations: &Revocations) -> io::Result<()> {
        let (path, witness) = (self.revocations_file(), self.revocations_witness());
        let text = serde_json::to_vec(revocations)?;
        let (before, after) = (name_of(if_there(fs::read(&path))?.as_deref()), name_of(Some(&text)));
        // Whenever this is cut short, the file is one that the witness knows.
        write_secret(&witness, format!("{before}\n{after}\n").as_bytes())?;
        write_secret(&path, &text)?;
        write_secret(&witness, format!("{after}\n").as_bytes())
    }

    pub(crate) fn minting_key_file(&self) -> PathBuf {
        self.dir.join("keys").join("minting")
    }

    /// The key that signs the narrower tokens that clients ask for.
    pub(crate) fn minting_key(&self) -> Result<SigningKey, Failure> {
        self.signing_key_at(&self.minting_key_file())
    }

    /// The engine's directory.
    pub(crate) fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// TLS sessions that clients may resume. Disposable.
    pub(crate) fn tickets(&self) -> PathBuf {
        self.dir.join("tickets")
    }

    /// Where other processes of this machine ask the server that runs.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("server.sock")
    }

    /// The file that clients on this machine read.
    pub(crate) fn connect_file(&self) -> PathBuf {
        self.dir.join("connect.json")
    }

    /// The key that `serve --dev` signs tokens with.
    pub(crate) fn signing_key_file(&self) -> PathBuf {
        self.dir.join("keys").join("signing")
    }

    /// Makes the directory, readable by its owner only.
    pub(crate) fn create(&self) -> Result<(), Failure> {
        let keys = self.dir.join("keys");
        let mut dirs = fs::DirBuilder::new();
        dirs.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut dirs, 0o700);
        dirs.create(&keys).map_err(|error| Failure::io(keys.display(), &error))
    }

    pub(crate) fn tls_key_file(&self) -> PathBuf {
        self.dir.join("keys").join("tls.pem")
    }

    /// The keys that let clients learn of a restart at once.
    pub(crate) fn server_keys(&self) -> Result<ServerKeys, Failure> {
        let path = self.dir.join("keys").join("quic");
        let text = self.secret(&path, || {
            let keys = ServerKeys::generate();
            Ok([&keys.reset[..], &keys.connection_id, &keys.token].map(hex).join("\n") + "\n")
        })?;
        let mut lines = text.lines();
        let keys = (|| {
            Some(ServerKeys {
                reset: unhex(lines.next()?)?,
                connection_id: unhex(lines.next()?)?,
                token: unhex(lines.next()?)?,
            })
        })();
        keys.ok_or_else(|| {
            Failure::integrity(format!("{} does not hold three keys; restore or remove it", path.display()))
        })
    }

    /// The key of the development certificate.
    pub(crate) fn tls_key(&self) -> Result<String, Failure> {
        self.secret(&self.tls_key_file(), || {
            Identity::generate_key().map_err(|error| Failure::failed("INTERNAL", error))
        })
    }

    /// The key that signs development tokens.
    pub(crate) fn signing_key(&self) -> Result<SigningKey, Failure> {
        self.signing_key_at(&self.signing_key_file())
    }

    fn signing_key_at(&self, path: &Path) -> Result<SigningKey, Failure> {
        let text = self.secret(path, || {
            let key = SigningKey::generate().map_err(|error| Failure::failed("INTERNAL", error))?;
            Ok(key.to_paserk() + "\n")
        })?;
        SigningKey::from_paserk(&text).map_err(|error| Failure::integrity(format!("{}: {error}", path.display())))
    }

    /// The keys that seal and open resume tokens, the one that seals first.
    pub(crate) fn resume_keys(&self) -> Result<ResumeKeys, Failure> {
        let path = self.dir.join("keys").join("resume");
        let text = self.secret(&path, || {
            let keys = ResumeKeys::generate().map_err(|error| Failure::failed("INTERNAL", error))?;
            Ok(keys.to_paserk() + "\n")
        })?;
        ResumeKeys::from_paserk(&text).map_err(|error| Failure::integrity(format!("{}: {error}", path.display())))
    }

    /// Reads a secret, or makes it.
    fn secret(&self, path: &Path, make: impl FnOnce() -> Result<String, Failure>) -> Result<String, Failure> {
        match fs::read_to_string(path) {
            Ok(text) => Ok(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = make()?;
                write_secret(path, text.as_bytes()).map_err(|error| Failure::io(path.display(), &error))?;
                Ok(text)
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(Failure::integrity(format!("{} is not text; restore or remove it", path.display())))
            }
            Err(error) => Err(Failure::io(path.display(), &error)),
        }
    }
}

/// What was read, if the file is there.
fn if_there(read: io::Result<Vec<u8>>) -> io::Result<Option<Vec<u8>>> {
    match read {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// By what a witness knows the bytes of a file, or that there is none.
fn name_of(bytes: Option<&[u8]>) -> String {
    bytes.map_or_else(|| "none".to_owned(), |bytes| blake3::hash(bytes).to_hex().to_string())
}

/// A name in the same directory for what is to become `path`, which nobody else uses.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".mainstay-tmp");
    path.with_file_name(name)
}

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = beside(path);
    // Left by a process that was killed.
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The name is as durable as what is behind it.
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(dir)?.sync_all()
}

fn default_dir() -> Result<PathBuf, Failure> {
    if let Some(dir) = std::env::var_os("MAINSTAY_DATA").filter(|dir| !dir.is_empty()) {
        return Ok(dir.into());
    }
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local").join("state"));
    let state = state
        .or_else(home)
        .ok_or_else(|| Failure::usage("neither MAINSTAY_DATA, XDG_STATE_HOME nor HOME is set; use --data"))?;
    Ok(state.join("mainstay"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |at: usize| (pair[at] as char).to_digit(16);
        *byte = (digit(0)? << 4 | digit(1)?) as u8;
    }
    Some(bytes)
}

/// Does something with a client of the server that the connection file names, tells meanwhile what becomes of the connection, and says goodbye
/// to the server.
pub(crate) async fn with_client<T>(
    connect: Option<&Path>,
    config: Config,
    output: Output,
    work: impl AsyncFnOnce(&Client) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let give_up_after = config.give_up_after;
    let client = client(connect, config)?;
    let result = tokio::select! {
        result = work(&client) => result,
        Err(failure) = tell(&client, give_up_after, output) => Err(failure),
    };
    client.finish().await;
    result
}

/// Tells of each loss of the server, and of what is in the way. Ends only if it cannot tell.
async fn tell(client: &Client, give_up_after: Option<Duration>, output: Output) -> Result<(), Failure> {
    let (mut paths, mut connection) = (client.path_changes(), client.connection());
    let again = give_up_after.map_or_else(String::new, |limit| format!(" for {} s", limit.as_secs()));
    loop {
        tokio::select! {
            event = paths.next() => match event {
                Some(PathEvent::Unreachable(error)) => output.warning(&error.name(), &format!("{error}; trying again"))?,
                Some(_) => {}
                None => break,
            },
            connected = connection.changed() => match connected {
                Some(false) => output.warning("UNAVAILABLE", &format!("the server is lost; trying again{again}"))?,
                Some(true) => {}
                None => break,
            },
        }
    }
    core::future::pending().await
}

/// What followers say when their connection moved to another network.
pub(crate) const PATH_CHANGED: &str = "the network changed; the connection goes on over the new one";

/// How long the server may take before that is told.
const SLOW: Duration = Duration::from_secs(2);

/// Does what needs the server and the session, and says when that takes long and why.
pub(crate) async fn patiently<T>(
    client: &Client,
    session: &str,
    output: Output,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, Failure> {
    tokio::pin!(work);
    tokio::select! {
        result = &mut work => return result.about(session),
        () = tokio::time::sleep(SLOW) => {}
    }
    let reachable = tokio::select! {
        biased;
        connected = client.connected() => connected.is_ok(),
        () = core::future::ready(()) => false,
    };
    // What else is in the way is told of the connection.
    if reachable {
        match client.refusal(session) {
            Some(error) if error.name() == "SESSION_NOT_FOUND" => {
                output.warning("WAITING", &format!("session {session} does not exist yet; waiting for it"))?;
            }
            Some(error) => output.warning(&error.name(), &format!("session {session}: {error}; trying again"))?,
            None => {
                output.warning("WAITING", &format!("session {session}: the server takes its time; waiting for it"))?
            }
        }
    }
    work.await.about(session)
}

fn client(connect: Option<&Path>, config: Config) -> Result<Client, Failure> {
    Ok(Client::connect_quic(&connect_file(connect)?, config)?)
}

/// The connection file that was named, or the one that `serve --dev` wrote.
pub(crate) fn connect_file(connect: Option<&Path>) -> Result<ConnectFile, Failure> {
    let path = match connect {
        Some(path) => path.to_owned(),
        None => Data::new(None)?.connect_file(),
    };
    if connect.is_none() && !path.exists() {
        return Err(Failure {
            exit: crate::failure::Exit::Unreachable,
            code: "UNREACHABLE".into(),
            message: format!(
                "no server is known: {} does not exist; start one with `mainstay serve --dev`, or name its connection \
                 file with --connect or MAINSTAY_CONNECT",
                path.display()
            ),
            retryable: true,
        });
    }
    Ok(ConnectFile::read(&path)?)
}
