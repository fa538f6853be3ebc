//! The shared state of a view: keys with values (spec STATE, FOLD-6).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::{Digest, Form};
use crate::error::ProtocolError;
use crate::planted::{Bug, planted};
use crate::registry::{MAX_STATE_BYTES, MAX_STATE_KEYS};
use crate::session::words::{Author, Key};
use crate::wire::{Field, Reader, Writer};

/// A key's value as it is at the view's seq.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Seq of the record that wrote it.
    pub revision: u64,
    /// Who wrote it.
    pub author: Arc<Author>,
    /// When it expires, in milliseconds since the Unix epoch.
    pub expires: Option<u64>,
    /// The value.
    pub value: Bytes,
}

crate::kept::keeps!(Entry, revision author expires, keeps value);

/// The shared state of a session: keys that have a value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    by_key: BTreeMap<Key, (Entry, Digest)>,
    /// Bytes of all keys and values.
    bytes: usize,
    deadlines: BTreeSet<(u64, Key)>,
}

impl Entries {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.by_key.get(key).map(|(entry, _)| entry)
    }

    /// Every key that has a value, in the order of their bytes.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&Key, &Entry)> {
        self.by_key.iter().map(|(key, (entry, _))| (key, entry))
    }

    /// Keys that have a value.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// True if no key has one.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The keys whose values expire, the first one first.
    pub(in crate::session) fn deadlines(&self) -> impl Iterator<Item = &(u64, Key)> {
        self.deadlines.iter()
    }

    /// What would exceed a limit does nothing: no server accepted it.
    pub(super) fn put(&mut self, key: Key, entry: Entry) {
        let before = self.by_key.get(&key).map(|(entry, _)| key.as_str().len() + entry.value.len());
        let bytes = self.bytes - before.unwrap_or(0) + key.as_str().len() + entry.value.len();
        if bytes > MAX_STATE_BYTES || before.is_none() && self.by_key.len() == MAX_STATE_KEYS {
            return;
        }
        let known = self.by_key.get(&key).filter(|_| planted(Bug::DigestKept)).map(|(_, digest)| digest.clone());
        self.remove(&key);
        self.bytes = bytes;
        if let Some(at) = entry.expires {
            self.deadlines.insert((at, key.clone()));
        }
        self.by_key.insert(key, (entry, known.unwrap_or_default()));
    }

    pub(super) fn remove(&mut self, key: &Key) {
        if let Some((key, (entry, _))) = self.by_key.remove_entry(key) {
            self.bytes -= key.as_str().len() + entry.value.len();
            if let Some(at) = entry.expires {
                self.deadlines.remove(&(at, key));
            }
        }
    }

    pub(super) fn put_to(&self, form: Form, w: &mut Writer) {
        w.varint(self.by_key.len() as u64);
        for (key, (entry, digest)) in &self.by_key {
            key.put(w);
            w.varint(entry.revision);
            entry.author.put(w);
            Field::put(&entry.expires, w);
            form.put_known(&entry.value, digest, w);
        }
    }

    /// Reads what [`Entries::put_to`] wrote whole, of a view that ends at `next`.
    pub(super) fn get_from(r: &mut Reader<'_>, next: u64) -> Result<Self, ProtocolError> {
        let mut this = Self::default();
        let count = r.count(MAX_STATE_KEYS)?;
        for _ in 0..count {
            let key = Key::get(r)?;
            if this.by_key.last_key_value().is_some_and(|(last, _)| *last >= key) {
                return Err(ProtocolError::malformed("keys of a view are not in ascending order"));
            }
            let entry = Entry {
                revision: r.varint()?,
                author: Arc::new(Author::get(r)?),
                expires: Field::get(r)?,
                // Its own memory: the view outlives what it is read from.
                value: Bytes::copy_from_slice(&r.bytes(MAX_STATE_BYTES)?),
            };
            if entry.revision >= next {
                return Err(ProtocolError::malformed("key of a view was written beyond its end"));
            }
            this.put(key, entry);
        }
        if this.len() != count {
            return Err(ProtocolError::malformed("state of a view exceeds its limit"));
        }
        Ok(this)
    }
}
