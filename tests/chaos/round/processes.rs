//! Steps that make and end processes.

use super::*;

impl Round {
    pub(super) fn fork(&mut self, process: usize, child: usize) -> Outcome {
        if child == 0 || child >= PROCESSES || self.process(process).is_none() || self.process(child).is_some() {
            return Ok(());
        }
        self.local.drain(child);
        let pid = match self.ask(process, Job::Fork { child })? {
            Answer::Value(pid) => pid as i32,
            other => return Err(format!("fork: {other:?}")),
        };
        let pidfd = pidfd(pid);
        let Some(parent) = self.process(process) else { return Ok(()) };
        let space = parent.space.forked();
        let mut regions = parent.regions.clone();
        regions.values_mut().for_each(|region| region.here = false);
        self.processes[child] = Some(Process { pid, parent: process, pidfd: Some(pidfd), space, regions });
        let answer = self.hear(child)?;
        ensure!(answer == Answer::Hello { pid }, "{answer:?}");
        for vmap in self.vmaps.iter_mut().flatten() {
            vmap.known &= !(1 << child);
            vmap.known |= (vmap.known >> process & 1) << child;
        }
        self.most_processes = self.most_processes.max(self.processes.iter().flatten().count());
        Ok(())
    }

    pub(super) fn kill(&self, process: usize) {
        if let Some(process) = self.process(process) {
            // SAFETY: a process of this round that nobody has reaped.
            unsafe { libc::kill(process.pid, libc::SIGKILL) };
        }
    }

    /// A process runs another program: it has no area any more, before it ends.
    pub(super) fn executed(&mut self, process: usize) -> Outcome {
        let Some(pid) = self.process(process).map(|process| process.pid) else { return Ok(()) };
        let start = Instant::now();
        while std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() != "sleep") {
            ensure!(start.elapsed() < LATE, "the process does not execute");
            std::thread::yield_now();
        }
        self.space(process).cells.clear();
        self.late = true;
        self.counts()?;
        self.kill(process);
        Ok(())
    }

    /// Waits for the end of a process, and has its parent reap it.
    pub(super) fn gone(&mut self, process: usize) -> Outcome {
        let Some(Process { pid, parent, pidfd, .. }) = self.processes[process].take() else { return Ok(()) };
        if let Some(pidfd) = &pidfd {
            ended(pidfd);
        }
        for other in self.processes.iter_mut().flatten().filter(|other| other.parent == process) {
            other.parent = 0;
        }
        for vmap in self.vmaps.iter_mut().flatten() {
            vmap.known &= !(1 << process);
        }
        let answer = self.ask(parent, Job::Reap { pid })?;
        ensure!(answer == Answer::Done, "reaping: {answer:?}");
        Ok(())
    }
}
