//! Stores that older versions wrote: each is whole, opens, and gives back what it was given.
//!
//! A directory of `golden` is called as the format is (`mainstay store 3`), and was written by the version that wrote that format, with
//! plain records, streams, messages, state, a trim, a closed session and a deleted one. A new format brings a directory of its own and the
//! step from the one before; none is ever changed.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mainstay_protocol::registry::FOLD_VERSION;
use mainstay_protocol::session::SessionName;
use mainstay_store::{ReadFrom, Store};
use mainstay_store_fjall::verify::{Found, verify};
use mainstay_store_fjall::{Config, FjallStore, OpenError};

/// Name, first seq, tail and view hash, under fold version 5.
const SESSIONS: &[(&str, u64, u64, &str)] = &[
    ("chat", 0, 6, "7a3fcb9a3cfd9d31fd95509c14aa1b53b8a94dfb6449a90053f82898ae500eb4"),
    ("closed", 0, 2, "4af03221c6280e3235e5f73d90cb983d9627a911b4e0123f67af371d5b1b330b"),
    ("plain", 0, 202, "92de66e609a2e6c0d378f79211dc8f6315894809f3e3b05a6dcbd657929370ee"),
    ("shared", 0, 3, "bcca35ed83c81c88d85baebe0c45e7e9bc8a6140675cba68cb7e2c1f4fd96492"),
    ("trimmed", 20, 50, "29faefa3a1d843cc56a0379a9715082ba85ad1f409e79328b9f3f6e5254c1b5c"),
];

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copy");
        }
    }
}

/// A copy of each, and its name.
fn golden() -> Vec<(String, tempfile::TempDir, PathBuf)> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join("golden");
    let mut found = Vec::new();
    for entry in fs::read_dir(all).expect("the fixtures") {
        let entry = entry.expect("an entry");
        let temp = tempfile::tempdir().expect("a directory");
        let dir = temp.path().join("store");
        copy(&entry.path(), &dir);
        found.push((entry.file_name().to_string_lossy().into_owned(), temp, dir));
    }
    found
}

#[tokio::test]
async fn stores_of_every_format_are_whole_and_open() {
    let stores = golden();
    assert!(!stores.is_empty(), "there are no fixtures");
    for (format, _temp, dir) in stores {
        let mut seen = Vec::new();
        let report = verify(&dir, &mut |name, found| {
            if let Found::Session { state, .. } = found {
                seen.push((name.to_string(), state.first(), state.tail(), state.view().hash().to_string()));
            }
            ControlFlow::Continue(())
        });
        let report = report.unwrap_or_else(|error| panic!("format {format}: {error}"));
        assert_eq!(report.problems, [], "format {format}");
        seen.sort();
        let expected: Vec<_> = SESSIONS
            .iter()
            .map(|(name, first, tail, hash)| ((*name).to_owned(), *first, *tail, (*hash).to_owned()))
            .collect();
        // Another fold makes other hashes of the same records.
        let known = |all: &[(String, u64, u64, String)]| -> Vec<(String, u64, u64, String)> {
            let hash = |hash: &String| if FOLD_VERSION == 5 { hash.clone() } else { String::new() };
            all.iter().map(|(name, first, tail, of)| (name.clone(), *first, *tail, hash(of))).collect()
        };
        assert_eq!(known(&seen), known(&expected), "format {format}");

        let store =
            FjallStore::open(&dir, Config::default()).unwrap_or_else(|error| panic!("format {format}: {error}"));
        for (name, first, tail, _) in SESSIONS {
            let stat = store.stat(SessionName::new(name).expect("a name")).await.expect("stat").expect("the session");
            assert_eq!((stat.first, stat.tail), (*first, *tail), "format {format}, {name}");
            let (mut next, mut records) = (*first, 0);
            while next < *tail {
                let page = store.read(stat.session.clone(), ReadFrom::Seq(next), 1 << 20).await.expect("read");
                records += page.chunks.iter().flat_map(|chunk| chunk.records()).filter(Result::is_ok).count();
                next = page.chunks.last().expect("a chunk").end();
            }
            assert!(records as u64 >= tail - first, "format {format}, {name}: {records} records");
            store.open_writer(stat.session).await.expect("a writer");
        }
        let deleted = store.stat(SessionName::new("deleted").expect("a name")).await.expect("stat");
        assert_eq!(deleted, None, "format {format}");
    }
}

#[test]
fn a_store_of_an_unknown_format_is_refused_by_name() {
    let (_, _temp, dir) = golden().pop().expect("a fixture");
    let text = fs::read_to_string(dir.join("format")).expect("the format file");
    let (first, rest) = text.split_once('\n').expect("lines");
    fs::write(dir.join("format"), format!("mainstay store 99\n{rest}")).expect("write");
    let refused = [
        FjallStore::open(&dir, Config::default()).map(drop).expect_err("refused"),
        verify(&dir, &mut |_, _| ControlFlow::Continue(())).expect_err("refused"),
    ];
    for error in refused {
        assert!(matches!(error, OpenError::Version(_)), "{error}");
        let said = error.to_string();
        assert!(said.contains("mainstay store 99") && said.contains(first), "{said}");
    }
}
