//! What a run found wrong.

use mainstay_checker::verdict::{Class, Verdict};

/// What is wrong: nothing, if it is empty.
#[derive(Debug, Default)]
pub struct Findings {
    /// What the checker found in the history.
    pub classes: Vec<Class>,
    /// What somebody else noticed, in words.
    pub texts: Vec<String>,
}

impl Findings {
    /// True if nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.classes.is_empty() && self.texts.is_empty()
    }

    /// What a verdict says is wrong.
    pub fn of(verdict: &Verdict) -> Self {
        Self { classes: verdict.broken.keys().copied().collect(), texts: Vec::new() }
    }

    /// What somebody noticed.
    pub fn told(text: String) -> Self {
        Self { texts: vec![text], ..Self::default() }
    }

    /// Names of classes, and the beginning of each text.
    pub fn in_short(&self) -> String {
        let classes = self.classes.iter().map(|class| class.name().to_owned());
        let texts = self.texts.iter().map(|text| text.lines().next().unwrap_or_default().chars().take(120).collect());
        classes.chain(texts).take(5).collect::<Vec<String>>().join(", ")
    }

    /// This as well.
    pub fn add(&mut self, more: Self) {
        self.classes.extend(more.classes);
        self.texts.extend(more.texts);
    }

    /// Tells something more, and keeps it.
    pub fn tell(&mut self, text: String) {
        println!("{text}");
        self.texts.push(text);
    }
}
