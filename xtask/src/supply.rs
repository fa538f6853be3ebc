//! What the binary is made of: versions below which something must not be, and a bill of materials.

use std::collections::BTreeMap;
use std::fs;

use crate::{Outcome, cargo, root};

/// Packages of `Cargo.lock`: name to versions.
fn locked() -> Result<BTreeMap<String, Vec<String>>, String> {
    let text = fs::read_to_string(root().join("Cargo.lock")).map_err(|error| format!("Cargo.lock: {error}"))?;
    let mut packages: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in text.split("[[package]]").skip(1) {
        if let (Some(name), Some(version)) = (field(package, "name"), field(package, "version")) {
            packages.entry(name).or_default().push(version);
        }
    }
    Ok(packages)
}

/// The text of a line `name = "text"`.
fn field(table: &str, name: &str) -> Option<String> {
    let line = table.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('='))?;
    Some(line.trim().strip_prefix('"')?.strip_suffix('"')?.to_owned())
}

/// The numbers of a version, for comparing.
fn numbers(version: &str) -> Vec<u64> {
    let plain = version.split(['-', '+']).next().unwrap_or_default();
    plain.split('.').filter_map(|part| part.parse().ok()).collect()
}

/// Holds `Cargo.lock` to the floors. Errors: a version below its floor, a floor for what is not there, an entry without a reason.
pub(crate) fn floors() -> Outcome {
    eprintln!("== floors of versions");
    let text = fs::read_to_string(root().join("security-floors.toml"));
    let text = text.map_err(|error| format!("security-floors.toml: {error}"))?;
    let (packages, mut wrong, mut count) = (locked()?, Vec::new(), 0);
    for floor in text.split("[[floor]]").skip(1) {
        count += 1;
        let (Some(name), Some(least)) = (field(floor, "name"), field(floor, "version")) else {
            return Err(format!("security-floors.toml: an entry without name or version:{floor}"));
        };
        if field(floor, "why").is_none_or(|why| why.is_empty()) {
            wrong.push(format!("the floor of {name} has no reason"));
        }
        match packages.get(&name) {
            None => wrong.push(format!("there is a floor for {name}, which is no dependency any more")),
            Some(versions) => {
                let below = versions.iter().filter(|version| numbers(version) < numbers(&least));
                wrong.extend(below.map(|version| format!("{name} {version} is below its floor {least}")));
            }
        }
    }
    if count == 0 {
        wrong.push("security-floors.toml names nothing".into());
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
}

/// Text as JSON.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Writes what the binary is made of, in the format of CycloneDX, to `target/mainstay.cdx.json`.
pub(crate) fn sbom() -> Outcome {
    let mut tree = cargo(&["tree", "-p", "mainstay", "-e", "normal", "--prefix", "none", "--locked"]);
    let output = tree.args(["--format", "{p}|{l}|{r}"]).output().map_err(|error| format!("cargo tree: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo tree: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut components = BTreeMap::new();
    for line in text.lines() {
        let mut parts = line.trim_end_matches(" (*)").split('|');
        let (Some(package), license, source) = (parts.next(), parts.next(), parts.next()) else { continue };
        let mut words = package.split(' ');
        let (Some(name), Some(version)) = (words.next(), words.next()) else { continue };
        let version = version.trim_start_matches('v');
        let mut component = format!(
            "{{\"type\": \"library\", \"name\": {}, \"version\": {}, \"purl\": {}",
            quoted(name),
            quoted(version),
            quoted(&format!("pkg:cargo/{name}@{version}"))
        );
        if let Some(license) = license.filter(|license| !license.is_empty()) {
            component
                .push_str(&format!(", \"licenses\": [{{\"expression\": {}}}]", quoted(&license.replace('/', " OR "))));
        }
        if let Some(source) = source.filter(|source| source.starts_with("https://")) {
            component
                .push_str(&format!(", \"externalReferences\": [{{\"type\": \"vcs\", \"url\": {}}}]", quoted(source)));
        }
        component.push('}');
        components.insert((name.to_owned(), version.to_owned()), component);
    }
    if components.len() < 50 {
        return Err(format!("only {} components were found", components.len()));
    }
    let list: Vec<&str> = components.values().map(String::as_str).collect();
    let text = format!(
        "{{\n\"bomFormat\": \"CycloneDX\",\n\"specVersion\": \"1.5\",\n\"version\": 1,\n\"metadata\": {{\"component\": {{\"type\": \
         \"application\", \"name\": \"mainstay\"}}}},\n\"components\": [\n{}\n]\n}}\n",
        list.join(",\n")
    );
    let path = root().join("target").join("mainstay.cdx.json");
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    eprintln!("== {} components in {}", components.len(), path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(numbers("0.11.9") < numbers("0.11.19"));
        assert!(numbers("1.0.0-rc.1") == numbers("1.0.0"));
        assert!(numbers("0.12.0") > numbers("0.11.19"));
        assert_eq!(field("\nname = \"x\"\nversion = \"1\"\n", "version").as_deref(), Some("1"));
    }

    #[test]
    fn text_is_quoted_as_json_wants_it() {
        assert_eq!(quoted("a\"b\\c\n"), "\"a\\\"b\\\\c\\u000a\"");
    }
}
