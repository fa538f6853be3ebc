//! What may be read of a session of which a chunk does not read any more, beside what was read of it before.

use std::collections::BTreeMap;

use mainstay_client::{Kind, MessageId, ReadRecord};

/// A record as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its seq.
    pub seq: u64,
    /// Its kind.
    pub kind: Kind,
    /// The message that it belongs to.
    pub message: Option<MessageId>,
    /// What it holds.
    pub payload: Vec<u8>,
    /// Time, author, stream and run: compaction leaves them as they are.
    pub place: String,
    /// The server wrote it by itself.
    pub of_server: bool,
}

impl Row {
    /// Of a record that came.
    pub fn of(read: &ReadRecord<'_>) -> Self {
        let ReadRecord { seq, time, author, stream, record, .. } = read;
        let place = format!("{time} {author} {stream} {:?} {:?}", record.run, record.headers);
        Self {
            seq: *seq,
            kind: record.kind,
            message: record.message,
            payload: record.payload.to_vec(),
            place,
            of_server: author.is_server(),
        }
    }

    /// The message of which it is a part.
    fn part_of(&self) -> Option<MessageId> {
        self.message.filter(|_| matches!(self.kind, Kind::MESSAGE_APPEND | Kind::MESSAGE_REPLACE))
    }
}

/// What somebody read from the beginning.
#[derive(Debug, Clone, Default)]
pub struct Readout {
    /// The records.
    pub rows: Vec<Row>,
    /// Behind the last seq that was covered.
    pub next: u64,
    /// He was told that whole messages may come in the place of their parts.
    pub compacted: bool,
}

impl Readout {
    /// The parts of messages by their seq, with all bytes that the message has behind each.
    fn parts(&self) -> BTreeMap<u64, (&Row, MessageId, Vec<u8>)> {
        let mut texts = BTreeMap::<_, Vec<u8>>::new();
        let mut parts = BTreeMap::new();
        for row in &self.rows {
            let Some(id) = row.part_of() else { continue };
            let text = texts.entry(id).or_default();
            if row.kind == Kind::MESSAGE_REPLACE {
                text.clear();
            }
            text.extend_from_slice(&row.payload);
            parts.insert(row.seq, (row, id, text.clone()));
        }
        parts
    }

    /// Whether it is `before` as far as it goes. What compaction may do meanwhile is no difference (spec COMPACT-1): parts of a message go,
    /// and one behind them has the whole text. Behind its end the server alone may have gone on: values expire when nobody is there, too.
    /// Errors: what differs.
    pub fn goes_on_as(&self, before: &Self) -> Result<(), String> {
        let is_of_server = |seq| self.rows.iter().any(|row| row.seq == seq && row.of_server);
        if !(before.next..self.next).all(is_of_server) {
            return Err(format!("it goes on to {}, where {} was the end", self.next, before.next));
        }
        let seqs = self.rows.iter().map(|row| row.seq);
        if !seqs.clone().is_sorted_by(|a, b| a < b) || seqs.clone().any(|seq| seq >= self.next) {
            return Err("its seqs are not in order".into());
        }
        // All but parts.
        let whole = |row: &&Row| row.part_of().is_none();
        let mut these = self.rows.iter().filter(whole).filter(|row| row.seq < before.next);
        let mut those = before.rows.iter().filter(whole).filter(|row| row.seq < self.next);
        loop {
            match (these.next(), those.next()) {
                (None, None) => break,
                (this, that) if this == that => {}
                (this, that) => return Err(format!("{this:?} in the place of {that:?}")),
            }
        }
        let (these, those) = (self.parts(), before.parts());
        for (seq, (this, id, text)) in &these {
            let same =
                those.get(seq).is_some_and(|(that, of, was)| id == of && text == was && this.place == that.place);
            if !same {
                return Err(format!("{this:?} makes another text than what was there: {:?}", those.get(seq)));
            }
        }
        for (seq, (that, id, _)) in those.range(..self.next).filter(|(seq, _)| !these.contains_key(seq)) {
            // The one that has its text may be behind what was read.
            let behind =
                |(at, (_, of, _)): (&u64, &(_, _, _))| of == id && (*at >= self.next || these.contains_key(at));
            if !self.compacted || !those.range(seq + 1..).any(behind) {
                return Err(format!("{that:?} is left out"));
            }
        }
        Ok(())
    }
}
