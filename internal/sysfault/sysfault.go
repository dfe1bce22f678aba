// Package sysfault has system calls of another program fail, for tests: the N-th write to a tap with EIO, every accept4 with EMFILE for a while.
//
// # Theory of operation
//
//	the test's process                               the program under test
//	Command --starts--> this binary again: Exec installs a seccomp filter on its one thread and becomes the program
//	Start   --pidfd_getfd--> the filter's listener
//	        <--each call of the list, with its arguments-- waits in the kernel
//	        --go on, or fail with this error-->
//
// So every call costs a round trip to the test, and nothing else about the program is different: calls that are not on the list, and those that no Rule
// matches, are made as ever. Rules can change at any time. What decides on a Rule is the call's number, and what one of its arguments is a descriptor
// of; memory that an argument points to is never looked at, since the program may change it.
package sysfault

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// env tells a test's binary, started again, what to do: the list of calls, by number.
const env = "VHOSTD_SYSFAULT"

// Rule says which calls fail.
type Rule struct {
	Call  int    // number of the system call
	File  string // part of what a descriptor among its arguments is of, as /proc/PID/fd shows it; "" is any
	Arg   int    // number of the argument that is that descriptor, from 0
	Skip  int    // that many succeed first
	Count int    // that many fail; 0: all from then on
	Errno syscall.Errno
}

// Injector decides on the calls of a program.
type Injector struct {
	pid, fd int

	mu    sync.Mutex
	rules []Rule
	seen  []int // by rule: calls that matched
	hits  []int // by rule: calls that failed
}

// Command is exec.Command for a program whose calls are to be decided on. The binary that calls it has Exec at the begin of its TestMain.
func Command(calls []int, name string, args ...string) *exec.Cmd {
	var list []string
	for _, c := range calls {
		list = append(list, strconv.Itoa(c))
	}
	self, err := os.Executable()
	if err != nil {
		panic("bug: a test without a binary: " + err.Error())
	}
	cmd := exec.Command(self, append([]string{name}, args...)...)
	cmd.Env = append(os.Environ(), env+"="+strings.Join(list, ","))
	return cmd
}

// Exec becomes the program that Command names, if the process was started by it, and returns otherwise.
func Exec() {
	list, ok := os.LookupEnv(env)
	if !ok {
		return
	}
	err := become(list)
	fmt.Fprintf(os.Stderr, "sysfault: %v\n", err)
	os.Exit(3)
}

func become(list string) error {
	var calls []int
	for word := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		calls = append(calls, n)
	}
	if err := os.Unsetenv(env); err != nil {
		return err
	}
	runtime.LockOSThread() // the filter is this thread's, and goes on with the program
	if _, err := install(calls); err != nil {
		return fmt.Errorf("seccomp filter: %w", err)
	}
	for !attached() { // the listener closes on exec, and with it what the test has not got
		time.Sleep(time.Millisecond)
	}
	return syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
}

// attached reports whether the test has the listener: then the standard input is at its end.
func attached() bool {
	p := []unix.PollFd{{Fd: 0, Events: unix.POLLIN}}
	n, _ := unix.Poll(p, 0)
	return n > 0 && p[0].Revents&unix.POLLHUP != 0
}

// Start starts a Command by start (which is cmd.Start, or does more), and decides on its calls.
func Start(cmd *exec.Cmd, start func(*exec.Cmd) error, rules ...Rule) (*Injector, error) {
	r, w, err := os.Pipe() // its end tells the program that it may begin
	if err != nil {
		return nil, err
	}
	defer r.Close()
	defer w.Close()
	cmd.Stdin = r
	if err := start(cmd); err != nil {
		return nil, err
	}
	in := &Injector{pid: cmd.Process.Pid}
	if in.fd, err = listenerOf(in.pid); err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	in.Set(rules...)
	go in.run()
	return in, nil
}

// patience bounds the wait for the listener.
const patience = 20 * time.Second

// listenerOf takes a copy of the listener of a process.
func listenerOf(pid int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(pidfd)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if err != nil {
			return -1, fmt.Errorf("the program is gone: %w", err)
		}
		i := slices.IndexFunc(fds, func(e os.DirEntry) bool {
			what, _ := os.Readlink(filepath.Join(dir, e.Name()))
			return strings.Contains(what, "seccomp notify")
		})
		if i < 0 {
			continue
		}
		n, err := strconv.Atoi(fds[i].Name())
		if err != nil {
			return -1, err
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			return -1, fmt.Errorf("pidfd_getfd: %w", err)
		}
		return fd, nil
	}
	return -1, fmt.Errorf("no filter within %v", patience)
}

// Set has these rules decide from now on, of which the first that matches does.
func (in *Injector) Set(rules ...Rule) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.rules, in.seen, in.hits = rules, make([]int, len(rules)), make([]int, len(rules))
}

// Hits is how many calls have failed by the rules that are set.
func (in *Injector) Hits() (n int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, h := range in.hits {
		n += h
	}
	return n
}

// run answers until the program has ended.
func (in *Injector) run() {
	defer unix.Close(in.fd)
	for {
		p := []unix.PollFd{{Fd: int32(in.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if p[0].Revents&unix.POLLIN == 0 {
			if p[0].Revents != 0 {
				return // nobody is left
			}
			continue
		}
		c, err := receive(in.fd)
		if err != nil {
			continue // the thread is gone, or has been interrupted
		}
		answer(in.fd, c.id, in.decide(c))
	}
}

// decide is the error that a call fails with, 0 for none.
func (in *Injector) decide(c call) syscall.Errno {
	in.mu.Lock()
	defer in.mu.Unlock()
	for i, r := range in.rules {
		if r.Call != int(c.nr) || r.File != "" && !strings.Contains(in.file(int(int32(c.args[r.Arg]))), r.File) {
			continue
		}
		in.seen[i]++
		if n := in.seen[i]; n <= r.Skip || r.Count > 0 && n > r.Skip+r.Count {
			return 0
		}
		in.hits[i]++
		return r.Errno
	}
	return 0
}

// file is what a descriptor of the program is of.
func (in *Injector) file(fd int) string {
	what, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", in.pid, fd))
	return what
}
