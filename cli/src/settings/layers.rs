//! Where settings come from, the last one counting: what a server does without any, the file, the environment, `--set`, and flags of their own.

use std::path::{Path, PathBuf};

use serde::Deserialize as _;
use toml::{Table, Value};

use super::Settings;
use crate::failure::Failure;

/// What `MAINSTAY_…` variables of settings begin with; parts of a name are put together with two underscores.
const PREFIX: &str = "MAINSTAY_";
/// Settings without parts. Other variables without parts are none of a server's.
const PLAIN: [&str; 4] = ["data", "listen", "admin", "users"];

/// The sources, so that they can be read again.
#[derive(Debug, Clone, Default)]
pub(crate) struct Layers {
    /// The file.
    pub(crate) file: Option<PathBuf>,
    /// `KEY=VALUE`, in their order.
    pub(crate) set: Vec<String>,
    /// Flags of their own, by the setting that each stands for.
    pub(crate) flags: Vec<(&'static str, Value)>,
}

impl Layers {
    /// Reads and merges them. Errors: what cannot be read, or is not known, and where it was said.
    pub(crate) fn read(&self, environment: impl Iterator<Item = (String, String)>) -> Result<Settings, Failure> {
        let mut table = match &self.file {
            Some(path) => read_file(path)?,
            None => Table::new(),
        };
        let mut sources = Vec::new();
        for (name, value) in environment {
            let Some(key) = key_of(&name) else {
                match meant(&name) {
                    Some(meant) => {
                        let what = format!(
                            "{name} is not a setting, and {meant} is: parts are put together with two underscores"
                        );
                        return Err(Failure::usage(what));
                    }
                    None => continue,
                }
            };
            put(&mut table, &key, parse(&value)).map_err(|error| Failure::usage(format!("{name}: {error}")))?;
            sources.push(name);
        }
        for set in &self.set {
            let (key, value) = set.split_once('=').ok_or_else(|| {
                Failure::usage(format!("--set {set}: not KEY=VALUE, for example limits.connections=1000"))
            })?;
            put(&mut table, key.trim(), parse(value))
                .map_err(|error| Failure::usage(format!("--set {set}: {error}")))?;
            sources.push(format!("--set {set}"));
        }
        for (key, value) in &self.flags {
            put(&mut table, key, value.clone()).map_err(Failure::usage)?;
        }
        Settings::deserialize(table).map_err(|error| {
            // The file alone was found to be right.
            let from = if sources.is_empty() { "the flags".to_owned() } else { sources.join(", ") };
            Failure::usage(format!("{}: {error}", from.trim_end()))
        })
    }
}

fn read_file(path: &Path) -> Result<Table, Failure> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    // By itself first: an error says in which line it is.
    let wrong = |error: toml::de::Error| Failure::usage(format!("{}: {error}", path.display()));
    toml::from_str::<Settings>(&text).map_err(wrong)?;
    toml::from_str(&text).map_err(wrong)
}

/// The setting that a variable stands for.
fn key_of(variable: &str) -> Option<String> {
    let name = variable.strip_prefix(PREFIX)?.to_ascii_lowercase();
    (PLAIN.contains(&name.as_str()) || name.contains("__")).then(|| name.replace("__", "."))
}

/// The variable of a setting that somebody wrote with single underscores. Of others that begin so nobody knows: a system may set them for a
/// service of this name.
fn meant(variable: &str) -> Option<String> {
    let words: Vec<&str> = variable.strip_prefix(PREFIX)?.split('_').collect();
    // No setting has more.
    if !(2..=MOST_WORDS).contains(&words.len()) {
        return None;
    }
    (1..1u32 << (words.len() - 1)).find_map(|parts| {
        let mut name = words[0].to_owned();
        for (at, word) in words.iter().enumerate().skip(1) {
            name.push_str(if parts >> (at - 1) & 1 == 1 { "__" } else { "_" });
            name.push_str(word);
        }
        let mut table = Table::new();
        put(&mut table, &name.to_ascii_lowercase().replace("__", "."), Value::Boolean(true)).ok()?;
        let known =
            Settings::deserialize(table).err().is_none_or(|error| !error.message().starts_with("unknown field"));
        known.then(|| format!("{PREFIX}{name}"))
    })
}

/// Words of the longest name of a setting, and some more.
const MOST_WORDS: usize = 8;

/// A value as TOML writes it; whatever is none is text.
fn parse(text: &str) -> Value {
    let line = format!("value = {text}");
    match toml::from_str::<Table>(&line).ok().and_then(|mut table| table.remove("value")) {
        Some(value) => value,
        None => Value::String(text.to_owned()),
    }
}

/// Puts a value at a dotted key.
fn put(table: &mut Table, key: &str, value: Value) -> Result<(), String> {
    let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
    match rest {
        None => {
            table.insert(first.to_owned(), value);
            Ok(())
        }
        Some(rest) => match table.entry(first).or_insert_with(|| Value::Table(Table::new())) {
            Value::Table(inner) => put(inner, rest, value),
            _ => Err(format!("{first} has no parts")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::REFERENCE;
    use super::*;

    fn read(file: &str, environment: &[(&str, &str)], set: &[&str]) -> Result<Settings, String> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mainstay.toml");
        std::fs::write(&path, file).expect("a file");
        let set = set.iter().map(|text| (*text).to_owned()).collect();
        let layers = Layers { file: Some(path), set, flags: Vec::new() };
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        layers.read(environment).map_err(|failure| failure.message)
    }

    #[test]
    fn the_environment_goes_before_the_file_and_what_is_set_before_both() {
        let file = "listen = \"127.0.0.1:1\"\n[limits]\nconnections = 1\nattachments = 1\nproducers = 1\n";
        let environment = [
            ("MAINSTAY_LIMITS__ATTACHMENTS", "2"),
            ("MAINSTAY_LIMITS__PRODUCERS", "2"),
            ("MAINSTAY_LISTEN", "127.0.0.1:2"),
            ("MAINSTAY_CONNECT", "not a setting"),
            ("MAINSTAY_LIMITS__SUBJECT__SIGNALS", "{ per_second = 3, burst = 4 }"),
        ];
        let settings = read(file, &environment, &["limits.producers=3"]).expect("settings");
        assert_eq!(settings.listen, Some(([127, 0, 0, 1], 2).into()));
        let config = settings.server(true).expect("a configuration");
        assert_eq!((config.connections, config.attachments, config.producers), (1, 2, 3));
        assert_eq!(config.quotas.subject.signals, mainstay_server::Rate::new(3, 4));
    }

    #[test]
    fn a_flag_of_its_own_goes_before_everything_else() {
        let listen = |port: u16| Value::String(format!("127.0.0.1:{port}"));
        let layers = Layers {
            file: None,
            set: vec!["listen=127.0.0.1:2".to_owned(), "limits.connections=2".to_owned()],
            flags: vec![("listen", listen(3))],
        };
        let environment = [("MAINSTAY_LISTEN".to_owned(), "127.0.0.1:1".to_owned())];
        let settings = layers.read(environment.into_iter()).map_err(|failure| failure.message).expect("settings");
        assert_eq!(settings.listen, Some(([127, 0, 0, 1], 3).into()));
        assert_eq!(settings.server(true).expect("a configuration").connections, 2);
    }

    #[test]
    fn what_is_not_known_is_refused_wherever_it_is_said() {
        let wrong = read("[limits]\nconections = 1\n", &[], &[]).expect_err("not known");
        assert!(wrong.contains("conections") && wrong.contains("line 2"), "{wrong}");
        for (single, meant) in [
            ("MAINSTAY_LIMITS_CONNECTIONS", "MAINSTAY_LIMITS__CONNECTIONS"),
            ("MAINSTAY_LIMITS_SUBJECT_SIGNALS", "MAINSTAY_LIMITS__SUBJECT__SIGNALS"),
            ("MAINSTAY_TLS_CLIENT_CA", "MAINSTAY_TLS__CLIENT_CA"),
        ] {
            let wrong = read("", &[(single, "1")], &[]).expect_err("not a setting");
            assert!(wrong.contains(single) && wrong.contains(meant), "{wrong}");
        }
        // As an orchestrator sets them for a service.
        let others = [("MAINSTAY_SERVICE_HOST", "10.0.0.1"), ("MAINSTAY_AUTH_SERVICE_PORT", "4433")];
        assert!(read("", &others, &[]).is_ok());
        let wrong = read("", &[("MAINSTAY_LIMITS__CONECTIONS", "1")], &[]).expect_err("not known");
        assert!(wrong.contains("MAINSTAY_LIMITS__CONECTIONS") && wrong.contains("conections"), "{wrong}");
        let wrong = read("", &[], &["limit.x=1"]).expect_err("not known");
        assert!(wrong.contains("--set limit.x=1"), "{wrong}");
        assert!(read("", &[], &["limits"]).is_err());
        assert!(read("", &[], &["limits.connections=many"]).is_err());
        assert!(
            read("[limits.subject]\nsignals = { per_second = 1, burst = 61 }\n", &[], &[])
                .expect("read")
                .server(true)
                .is_err()
        );
    }

    /// What it says is commented out stands for what is done without: both have to be the same.
    #[test]
    fn the_reference_names_what_is_done_without_a_file() {
        let uncommented: String = REFERENCE
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line))
            .map(|line| format!("{line}\n"))
            .collect();
        let without = read("", &[], &[]).expect("settings");
        let with = read(&uncommented, &[], &[]).expect("the reference can be read");
        let server = |settings: &Settings| format!("{:?}", settings.server(false).expect("a configuration"));
        assert_eq!(server(&with), server(&without));
        assert_eq!(format!("{:?}", with.store()), format!("{:?}", without.store()));
        let peers = |settings: &Settings| format!("{:?}", settings.peers().expect("peers"));
        assert_eq!(peers(&with), peers(&without));
        assert!(REFERENCE.lines().any(|line| line.starts_with("#: ")), "it names defaults");
    }
}
