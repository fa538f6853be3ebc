//! The backup format against `spec/registry.toml` and `spec/vectors/backups.toml` (`UPDATE_VECTORS=1` writes it after a deliberate change).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use mainstay_protocol::session::{
    Author, Chain, CheckedBatch, Chunk, ChunkBuilder, Compaction, Control, Incarnation, Instance, Record, SessionName,
    State,
};
use mainstay_protocol::wire::{Label, Subject, Writer};
use mainstay_store::backup::{BackupError, BackupReader, BackupWriter, HEAD, Item, MAX_ITEM, SavedSession, kind};
use toml::Table;

fn spec(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../spec").join(path)
}

#[test]
fn the_kinds_of_items_are_those_of_the_registry() {
    let registry: Table = std::fs::read_to_string(spec("registry.toml")).unwrap().parse().unwrap();
    let said: BTreeMap<&str, i64> = registry["backup_items"]
        .as_table()
        .unwrap()
        .iter()
        .map(|(name, number)| (name.as_str(), number.as_integer().unwrap()))
        .collect();
    let known = [
        ("session", kind::SESSION),
        ("snapshot", kind::SNAPSHOT),
        ("chunk", kind::CHUNK),
        ("whole", kind::WHOLE),
        ("broken", kind::BROKEN),
        ("end", kind::END),
    ];
    assert_eq!(said, known.into_iter().map(|(name, number)| (name, i64::from(number))).collect());
}

const LIFE: Incarnation = Incarnation([0xab; 16]);

fn saved() -> SavedSession {
    SavedSession {
        name: SessionName::new("agent:session123").unwrap(),
        incarnation: LIFE,
        created: 1_800_000_000_000,
        expire_after: 60_000,
        writer_epoch: 1,
        released: 0,
        compaction: Compaction::default(),
        first: (0, 0),
        chain: Chain::start(LIFE),
    }
}

fn chunk() -> Chunk {
    let mut builder = ChunkBuilder::new(LIFE, 0, 0, 1, 1_800_000_000_000, Chain::start(LIFE));
    builder.control(Control::Created { name: saved().name, time: 1_800_000_000_000 });
    let author = Arc::new(Author { subject: Subject::new("alice").unwrap(), instance: Instance([1; 16]) });
    let mut region = Writer::new();
    Record::data(0, "hello").put(&mut region);
    let batch = CheckedBatch::new(1, region.freeze()).unwrap();
    builder.batch(&author, &Label::new("agent").unwrap(), 1, 0, 1_800_000_000_005, &batch);
    builder.finish().unwrap()
}

fn golden() -> Vec<(&'static str, Vec<u8>)> {
    let (chunk, mut state) = (chunk(), State::new(LIFE));
    state.apply(&chunk).unwrap();
    let make = |fill: &dyn Fn(&mut BackupWriter<&mut Vec<u8>>)| {
        let mut bytes = Vec::new();
        let mut writer = BackupWriter::new(&mut bytes).unwrap();
        fill(&mut writer);
        writer.finish().unwrap();
        bytes
    };
    vec![
        ("nothing", make(&|_| {})),
        (
            "a session with a snapshot and a chunk",
            make(&|backup| {
                backup.session(&saved()).unwrap();
                backup.snapshot(&state.snapshot()).unwrap();
                backup.chunk(chunk.bytes()).unwrap();
                backup.whole(1, 1).unwrap();
            }),
        ),
        (
            "a session that could not be read, and an empty one",
            make(&|backup| {
                backup.session(&saved()).unwrap();
                backup.broken(0, "stored data is damaged").unwrap();
                backup.session(&SavedSession { name: SessionName::new("empty").unwrap(), ..saved() }).unwrap();
                backup.whole(0, 0).unwrap();
            }),
        ),
    ]
}

/// An item with a checksum that matches.
fn item(kind: u8, body: &[u8]) -> Vec<u8> {
    let head = [&[kind][..], &(body.len() as u32).to_be_bytes()].concat();
    let checksum = Chunk::checksum(&[&head[..], &Chunk::checksum(body).to_be_bytes()].concat());
    [&head[..], &checksum.to_be_bytes(), body].concat()
}

fn malformed() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let whole = golden().remove(1).1;
    let nothing = golden().remove(0).1;
    let mut flipped = whole.clone();
    flipped[60] ^= 1;
    let mut counted = nothing.clone();
    let hash = counted.split_off(counted.len() - 32);
    counted.truncate(HEAD.len());
    counted.extend(item(kind::END, &[&[1, 0, 0][..], &hash].concat()));
    let mut hashed = HEAD.to_vec();
    hashed.extend(item(kind::END, &[&[0, 0, 0][..], &[7; 32]].concat()));
    let mut long = HEAD.to_vec();
    long.push(kind::CHUNK);
    long.extend((MAX_ITEM as u32 + 1).to_be_bytes());
    long.extend([0; 8]);
    let with = |items: &[Vec<u8>]| [HEAD.to_vec(), items.concat()].concat();
    let length = whole[HEAD.len() + 1..HEAD.len() + 5].iter().fold(0, |n, byte| n << 8 | usize::from(*byte));
    let session = whole[HEAD.len()..HEAD.len() + 13 + length].to_vec();
    vec![
        ("it is empty", "NotABackup", vec![]),
        ("something else", "NotABackup", b"SQLite format 3\0\0\0\0\0".to_vec()),
        ("another version", "Version", b"mainstay backup 2\n".to_vec()),
        ("the end is missing", "Cut", whole[..whole.len() - 80].to_vec()),
        ("one byte is missing", "Cut", whole[..whole.len() - 1].to_vec()),
        ("a bit is another one", "Damaged", flipped),
        ("it counts other sessions", "Damaged", counted),
        ("the hash is another one", "Damaged", hashed),
        ("an item is longer than any may be", "Damaged", long),
        ("a kind that is not known", "Damaged", with(&[item(9, b"")])),
        ("a chunk without a session", "Damaged", with(&[item(kind::CHUNK, b"")])),
        ("a session in another one", "Damaged", with(&[session.clone(), session.clone()])),
        ("two snapshots", "Damaged", with(&[session.clone(), item(kind::SNAPSHOT, b""), item(kind::SNAPSHOT, b"")])),
        ("it ends in a session", "Damaged", with(&[session, item(kind::END, &[0; 35])])),
        ("a session with a name that none has", "Damaged", with(&[item(kind::SESSION, &[0; 70])])),
        ("more than a position", "Damaged", with(&[item(kind::WHOLE, &[0, 0, 0])])),
    ]
}

fn read(bytes: &[u8]) -> Result<Vec<Item>, BackupError> {
    let mut reader = BackupReader::new(bytes)?;
    let mut items = Vec::new();
    while let Some(item) = reader.next()? {
        items.push(item);
    }
    assert_eq!(reader.totals().bytes, bytes.len() as u64);
    Ok(items)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[test]
fn vectors_are_what_this_code_makes() {
    let path = spec("vectors/backups.toml");
    let mut text =
        "# Made by `UPDATE_VECTORS=1 cargo test -p mainstay-store --test backup`; see spec/vectors/README.md.\n"
            .to_owned();
    for (note, bytes) in golden() {
        write!(text, "\n[[golden]]\nname = \"backup\"\nnote = \"{note}\"\nhex = \"{}\"\n", hex(&bytes)).unwrap();
    }
    for (note, error, bytes) in malformed() {
        let hex = hex(&bytes);
        write!(text, "\n[[malformed]]\nname = \"backup\"\nnote = \"{note}\"\nhex = \"{hex}\"\nerror = \"{error}\"\n")
            .unwrap();
    }
    if std::env::var_os("UPDATE_VECTORS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn golden_vectors_are_read_and_no_beginning_of_one_is() {
    for (note, bytes) in golden() {
        let items = read(&bytes).unwrap_or_else(|error| panic!("{note}: {error}"));
        let mut again = BackupWriter::new(Vec::new()).unwrap();
        for item in &items {
            match item {
                Item::Session(session) => again.session(session).unwrap(),
                Item::Snapshot(state) => again.snapshot(state).unwrap(),
                Item::Chunk(chunk) => again.chunk(chunk).unwrap(),
                Item::Whole(seq, number) => again.whole(*seq, *number).unwrap(),
                Item::Broken(seq, why) => again.broken(*seq, why).unwrap(),
                Item::End(..) => {}
            }
        }
        assert_eq!(again.finish().unwrap().0, bytes, "{note}");
        for end in 0..bytes.len() {
            let cut = read(&bytes[..end]);
            let expected = match end < HEAD.len() {
                true => matches!(cut, Err(BackupError::NotABackup)),
                false => matches!(cut, Err(BackupError::Cut(at)) if at == end as u64),
            };
            assert!(expected, "{note}, {end}: {cut:?}");
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert!(read(&changed).is_err(), "{note}: bit {bit} of byte {at}");
            }
        }
    }
}

#[test]
fn malformed_vectors_give_their_errors() {
    for (note, expected, bytes) in malformed() {
        let error = read(&bytes).map(|items| items.len()).expect_err(note);
        let name = match error {
            BackupError::NotABackup => "NotABackup",
            BackupError::Version(_) => "Version",
            BackupError::Cut(_) => "Cut",
            BackupError::Damaged(..) => "Damaged",
            error => panic!("{note}: {error}"),
        };
        assert_eq!(name, expected, "{note}");
    }
}

/// Bytes, and how many were asked for at once at most: so many were allocated.
struct Asked<'a>(&'a [u8], usize);

impl Read for Asked<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.1 = self.1.max(into.len());
        self.0.read(into)
    }
}

#[test]
fn memory_follows_what_is_there_and_not_what_a_length_says() {
    let mut bytes = HEAD.to_vec();
    bytes.push(kind::CHUNK);
    bytes.extend((MAX_ITEM as u32).to_be_bytes());
    bytes.extend([0; 8]);
    bytes.extend([1; 100]);
    let mut asked = Asked(&bytes, 0);
    let result = BackupReader::new(&mut asked).and_then(|mut reader| reader.next().map(drop));
    assert!(matches!(result, Err(BackupError::Cut(_))), "{result:?}");
    assert!(asked.1 < 64 << 10, "{} bytes at once", asked.1);
}
