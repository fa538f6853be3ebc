//! Stores that older versions wrote: each is whole, opens, and gives back what it was given.
//!
//! A directory of `golden` is called as the format is (`mainstay store 3`), and was written by the version that wrote that format, with
//! plain records, streams, messages, state, a trim, a closed session and a deleted one. A new format brings a directory of its own and the
//! step from the one before; none is ever changed. Format 1 was in force for a day of development, and is not read.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mainstay_protocol::registry::FOLD_VERSION;
use mainstay_protocol::session::SessionName;
use mainstay_store::{ReadFrom, Store};
use mainstay_store_fjall::verify::{Found, Problem, verify};
use mainstay_store_fjall::{Config, FjallStore, OpenError};

/// Name, first seq, tail and view hash.
type Sessions = &'static [(&'static str, u64, u64, &'static str)];

/// The fold version of the hashes below.
const HASHED_AT: u64 = 6;
const OF_2: Sessions = &[
    ("chat", 0, 7, "8a4b88e9ec2042a8647503f5d4ebfcdcc8225d24ee2c8920212c41a6ec08dc41"),
    ("closed", 0, 3, "a0d879cc4920b58fe28ff40b0481c16ca931fdd6c7db6cfdd313b23877eec6b8"),
    ("plain", 0, 202, "e939f1221fda4abfcb1c86b93005f48255fd5d23a894882b6e3ae100e3466d4b"),
    ("shared", 0, 3, "cec6bfd66fbc08dbc865ba73d24fbe9888fb67e87477eb4e4c8abc16ff67a6f2"),
    ("trimmed", 20, 50, "acf08a266ef068125113b835726f4b1017f8f7b10a09c16b344948d5c0fdfa31"),
];
const OF_3: Sessions = &[
    ("chat", 0, 6, "475abbd5594904ac953edaf30f39479c0b653766a54ec0fdaeafa4106dcfe847"),
    ("closed", 0, 2, "d7760d0c5ba63a7cf8290676211045ae54108341ef41141e2835b2e1f0f0ed5b"),
    ("plain", 0, 202, "ad862536bde1dde0726bbd8966425f3bbc5b044606072ea78af26767a8a1a3ae"),
    ("shared", 0, 3, "efa1cb1e279aeeddc79fcddd7adf2c3c5c4fe42276f5f908734fa36c773487bb"),
    ("trimmed", 20, 50, "01b68abf708761da63ae00d585a98e2c1f91e78276bd2bb85aca02da692b59a7"),
];

/// What the store of a format holds, as the version that wrote it said; the hashes are those of its views by this fold.
fn sessions(format: &str) -> Sessions {
    match format {
        "2" => OF_2,
        "3" => OF_3,
        other => panic!("it is not known what the store of format {other} holds"),
    }
}

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
        let expected: Vec<_> = sessions(&format)
            .iter()
            .map(|(name, first, tail, hash)| ((*name).to_owned(), *first, *tail, (*hash).to_owned()))
            .collect();
        // Another fold makes other hashes of the same records.
        let known = |all: &[(String, u64, u64, String)]| -> Vec<(String, u64, u64, String)> {
            let hash = |hash: &String| if FOLD_VERSION == HASHED_AT { hash.clone() } else { String::new() };
            all.iter().map(|(name, first, tail, of)| (name.clone(), *first, *tail, hash(of))).collect()
        };
        assert_eq!(known(&seen), known(&expected), "format {format}");

        let store =
            FjallStore::open(&dir, Config::default()).unwrap_or_else(|error| panic!("format {format}: {error}"));
        for (name, first, tail, _) in sessions(&format) {
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
        drop(store);
        let text = fs::read_to_string(dir.join("format")).expect("the format file");
        assert_eq!(text.lines().next(), Some("mainstay store 3"), "format {format}");
        assert_eq!(problems(&dir), [], "format {format}");
    }
}

fn problems(dir: &Path) -> Vec<Problem> {
    verify(dir, &mut |_, _| ControlFlow::Continue(())).expect("a report").problems
}

/// A crash before or behind the step leaves what the next start goes on from.
#[test]
fn a_step_that_a_crash_cut_short_is_taken_once() {
    let (_, _temp, old) = golden().into_iter().find(|(format, ..)| format == "2").expect("the fixture");
    let commits = verify(&old, &mut |_, _| ControlFlow::Continue(())).expect("a report").commits;
    let begun = {
        let text = fs::read_to_string(old.join("format")).expect("the format file");
        let lines: Vec<&str> = text.lines().collect();
        let body = format!("mainstay store 3\n{}\n{}\nfrom 2 behind {commits}\n", lines[1], lines[2]);
        format!("{body}checksum {:016x}\n", xxhash_rust::xxh3::xxh3_64(body.as_bytes()))
    };
    let temp = tempfile::tempdir().expect("a directory");
    // It was said that it is taken, and it was not; it was taken, and not said.
    let (before, behind) = (temp.path().join("before"), temp.path().join("behind"));
    copy(&old, &before);
    drop(FjallStore::open(&old, Config::default()).expect("it opens"));
    copy(&old, &behind);
    for dir in [&before, &behind] {
        fs::write(dir.join("format"), &begun).expect("write");
        assert_eq!(problems(dir), []);
        drop(FjallStore::open(dir, Config::default()).expect("it opens"));
        assert_eq!(problems(dir), []);
        let text = fs::read_to_string(dir.join("format")).expect("the format file");
        assert!(text.starts_with("mainstay store 3\n") && !text.contains("from 2"), "{text}");
        let report = verify(dir, &mut |_, _| ControlFlow::Continue(())).expect("a report");
        assert_eq!((report.commits, report.sessions, report.records), (commits + 1, 5, 245));
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
