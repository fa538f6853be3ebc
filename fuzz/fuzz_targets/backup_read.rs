//! Backups from a file: nothing panics, and what is read is written again as it was. Checksums and hash are made right as well, so that what
//! is behind them is reached, down to the chunks of another life.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_protocol::session::{Chunk, Incarnation, Rebirth, State};
use mainstay_store::backup::{BackupReader, BackupWriter, HEAD, Item};

/// Reads everything, and brings the sessions back.
fn read(bytes: &[u8]) -> Option<Vec<Item>> {
    let mut reader = BackupReader::new(bytes).ok()?;
    let (mut items, mut rebirth, mut snapshot, mut first) = (Vec::new(), None, None, None);
    while let Some(item) = reader.next().ok()? {
        match &item {
            Item::Session(saved) => (rebirth, snapshot, first) = (None, None, Some(saved.clone())),
            Item::Snapshot(bytes) => {
                let kept = first.as_ref().map_or(0, |saved| saved.first.1);
                snapshot = State::restore_kept(bytes, kept).ok();
            }
            Item::Chunk(bytes) => {
                let saved = first.as_ref().expect("a session comes first");
                let begin =
                    || Rebirth::new(saved.incarnation, Incarnation([1; 16]), saved.first, saved.chain, snapshot.take());
                let rebirth: &mut Rebirth = rebirth.get_or_insert_with(begin);
                if let Ok(chunk) = Chunk::decode(bytes.clone())
                    && let Ok(reborn) = rebirth.chunk(&chunk)
                {
                    assert!(Chunk::decode(reborn.bytes().clone()).is_ok());
                }
            }
            Item::Whole(..) | Item::Broken(..) => drop(rebirth.take().map(Rebirth::finish)),
            Item::End(..) => {}
        }
        items.push(item);
    }
    Some(items)
}

fuzz_target!(|data: &[u8]| {
    let _ = read(data);
    let mut made = HEAD.to_vec();
    let mut rest = data;
    while let [kind, high, low, more @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(more.len());
        let (body, more) = more.split_at(length);
        rest = more;
        let mut body = Bytes::copy_from_slice(body);
        if *kind == 3 && body.len() > 8 {
            let checksum = Chunk::checksum(&body[8..]).to_be_bytes();
            body = [&checksum[..], &body[8..]].concat().into();
        }
        let head = [&[*kind][..], &(body.len() as u32).to_be_bytes()].concat();
        let checksum = Chunk::checksum(&[&head[..], &Chunk::checksum(&body).to_be_bytes()].concat());
        made.extend([&head[..], &checksum.to_be_bytes(), &body].concat());
    }
    let Some(items) = read(&made) else { return };
    let mut again = BackupWriter::new(Vec::new()).expect("memory");
    for item in &items {
        match item {
            Item::Session(session) => again.session(session),
            Item::Snapshot(state) => again.snapshot(state),
            Item::Chunk(chunk) => again.chunk(chunk),
            Item::Whole(seq, number) => again.whole(*seq, *number),
            Item::Broken(seq, why) => again.broken(*seq, why),
            Item::End(..) => Ok(()),
        }
        .expect("memory");
    }
    assert_eq!(again.finish().expect("memory").0, made);
});
