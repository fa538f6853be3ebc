//! The Debian package.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{Outcome, cargo, has, root, skipped, step, supply};

/// Builds the package into `target/package`: of a release build, or with `--debug` of what was built with everything else, to look whether it
/// can be.
pub(crate) fn run(args: &[&str]) -> Outcome {
    let debug = args.contains(&"--debug");
    if !has("dpkg-deb", &["--version"]) {
        skipped("the Debian package", "dpkg-deb is not there");
        return Ok(());
    }
    if !debug {
        step("build", &mut cargo(&["build", "--release", "--locked", "-p", "mainstay"]))?;
    }
    supply::sbom()?;
    let (target, from) = (root().join("target"), root().join("packaging"));
    let binary = target.join(if debug { "debug" } else { "release" }).join("mainstay");
    let stage = target.join("package").join("stage");
    let _ = fs::remove_dir_all(&stage);
    let wrong = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    let put = |from: &Path, to: &str, mode: &str| -> Outcome {
        let status = Command::new("install").args(["-D", "-m", mode]).arg(from).arg(stage.join(to)).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            _ => Err(format!("{to} cannot be put into the package")),
        }
    };
    put(&binary, "usr/bin/mainstay", "755")?;
    if !debug {
        step("strip", Command::new("strip").arg(stage.join("usr/bin/mainstay")))?;
    }
    put(&from.join("mainstay.service"), "usr/lib/systemd/system/mainstay.service", "644")?;
    put(&from.join("mainstay.socket"), "usr/lib/systemd/system/mainstay.socket", "644")?;
    put(&from.join("mainstay.toml"), "etc/mainstay/mainstay.toml", "644")?;
    put(&target.join("mainstay.cdx.json"), "usr/share/doc/mainstay/mainstay.cdx.json", "644")?;
    for name in ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"] {
        put(&root().join(name), &format!("usr/share/doc/mainstay/{name}"), "644")?;
    }
    let man = stage.join("usr/share/man/man1");
    fs::create_dir_all(&man).map_err(|error| wrong(&man, error))?;
    step("manual", Command::new(&binary).arg("man").arg(&man))?;
    for (shell, path) in [
        ("bash", "usr/share/bash-completion/completions/mainstay"),
        ("zsh", "usr/share/zsh/vendor-completions/_mainstay"),
        ("fish", "usr/share/fish/vendor_completions.d/mainstay.fish"),
    ] {
        let output = Command::new(&binary).args(["completions", shell]).output();
        let output = output.map_err(|error| format!("completions of {shell}: {error}"))?;
        let path = stage.join(path);
        let dir = path.parent().unwrap_or(&stage);
        fs::create_dir_all(dir).map_err(|error| wrong(dir, error))?;
        fs::write(&path, output.stdout).map_err(|error| wrong(&path, error))?;
    }
    let control = stage.join("DEBIAN");
    fs::create_dir_all(&control).map_err(|error| wrong(&control, error))?;
    let architecture = Command::new("dpkg").arg("--print-architecture").output();
    let architecture = architecture.map_err(|error| format!("dpkg: {error}"))?;
    let text = format!(
        "Package: mainstay\nVersion: {}\nArchitecture: {}\nMaintainer: The Mainstay authors <security@mainstay.invalid>\nDepends: libc6\n\
         Section: net\nPriority: optional\nHomepage: https://github.com/mainstay-dev/mainstay\n\
         Description: durable sessions for long-running AI agents\n \
         An ordered, durable log for each session, reached over QUIC, that outlives\n every connection and every process.\n",
        env!("CARGO_PKG_VERSION"),
        String::from_utf8_lossy(&architecture.stdout).trim()
    );
    for (name, text) in [("control", text), ("conffiles", "/etc/mainstay/mainstay.toml\n".to_owned())] {
        let path = control.join(name);
        fs::write(&path, text).map_err(|error| wrong(&path, error))?;
    }
    let package = target.join("package").join("mainstay.deb");
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "-Zgzip", "--build"]).arg(&stage).arg(&package);
    step("package", &mut build)?;
    look(&package)
}

/// Unpacks it elsewhere, and looks whether what is in it works.
fn look(package: &Path) -> Outcome {
    let dir = root().join("target").join("package").join("looked");
    let _ = fs::remove_dir_all(&dir);
    step("unpack", Command::new("dpkg-deb").arg("-x").arg(package).arg(&dir))?;
    let binary = dir.join("usr/bin/mainstay");
    step("its version", Command::new(&binary).arg("--version"))?;
    let mut check = Command::new(&binary);
    check.args(["serve", "--check", "--dev", "--config"]).arg(dir.join("etc/mainstay/mainstay.toml"));
    step("its settings", check.arg("--data").arg(dir.join("data")))?;
    if has("systemd-analyze", &["--version"]) {
        // Paths of the unit are those of an installed package; what it says of them is no mistake of the unit.
        let unit = dir.join("usr/lib/systemd/system/mainstay.service");
        let output = Command::new("systemd-analyze").arg("verify").arg(&unit).output();
        let output = output.map_err(|error| format!("systemd-analyze: {error}"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let bad: Vec<&str> =
            text.lines().filter(|line| line.contains("mainstay") && line.contains("Unknown")).collect();
        if !bad.is_empty() {
            return Err(bad.join("\n"));
        }
    } else {
        skipped("the systemd unit", "systemd-analyze is not there");
    }
    Ok(())
}
