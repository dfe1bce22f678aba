package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/vhostuser"
)

// source is where front-ends come from.
type source struct {
	vhostuser.Acceptor
	path string // of the vhost-user socket; "" when there is none that a VMM could use
	hint bool   // whoever starts the VMM wants to be told how
}

// activated tells whether a service manager has passed sockets to this process (sd_listen_fds).
func activated() bool { return os.Getenv("LISTEN_FDS") != "" }

// openSource makes the source that the settings name.
func openSource(s settings, log *slog.Logger) (source, error) {
	limits := vhostuser.ConnOptions{Admit: func(p sys.Peer) error {
		err := s.allowed.Admit(p)
		if err != nil {
			log.Warn("refused a front-end", "error", err)
		}
		return err
	}}
	conn := vhostuser.ListenOptions{Mode: s.mode, Conn: limits, Refused: func() {
		log.Warn("refused a second front-end: the device has one")
	}}
	switch {
	case s.client:
		d, err := vhostuser.NewDialer(s.socketPath, vhostuser.DialOptions{Conn: limits, Waiting: func(err error) {
			log.Info("waiting for the VMM to listen", "socket", s.socketPath, "error", err)
		}})
		return source{d, s.socketPath, true}, err
	case s.socketPath != "":
		return listen(s, conn)
	case s.fd >= 0:
		path := socketName(s.fd) // before the descriptor changes hands
		a, err := inherit(s.fd, conn)
		return source{a, path, false}, err
	}
	return activate(conn)
}

// listen makes the socket. Its owner and group are set before its mode lets the group in. It belongs to whom vhostd becomes, unless it is to belong to
// somebody else.
func listen(s settings, opts vhostuser.ListenOptions) (source, error) {
	given := s.group >= 0 || s.ownerOfSocket() >= 0
	if s.group >= 0 {
		opts.Mode &= 0o600
	}
	l, err := vhostuser.Listen(s.socketPath, opts)
	if err != nil || !given {
		return source{l, s.socketPath, true}, err
	}
	if err := ownSocket(s); err != nil {
		l.Close()
		return source{}, err
	}
	return source{l, s.socketPath, true}, nil
}

// ownerOfSocket is whom the socket is given to, -1 for nobody.
func (s settings) ownerOfSocket() int {
	if s.owner < 0 && s.become != nil {
		return s.become.UID
	}
	return s.owner
}

// ownSocket gives the socket its owner, its group and its mode. Without an owner or a group it is that of this process, also where it was another before.
func ownSocket(s settings) error {
	uid, gid := s.ownerOfSocket(), s.group
	if uid < 0 {
		uid = os.Geteuid()
	}
	if gid < 0 {
		gid = os.Getegid()
	}
	err := sys.OwnSocket(s.socketPath, uid, gid, s.mode)
	switch {
	case err == nil:
		return nil
	case s.socketOwner == "" && s.socketGroup == "":
		return fmt.Errorf("%s: %w", s.word("socket-mode"), err)
	case s.socketGroup == "":
		return fmt.Errorf("%s: %w (only root can give a socket away)", s.word("socket-owner"), err)
	}
	return fmt.Errorf("%s: %w (only root can give a socket away, and a member of a group to that group)", s.word("socket-group"), err)
}

// inherit takes over a descriptor, whichever of the two kinds it is.
func inherit(fd int, opts vhostuser.ListenOptions) (vhostuser.Acceptor, error) {
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	switch {
	case errors.Is(err, unix.EBADF):
		return nil, fmt.Errorf("descriptor %d is not open: whoever starts vhostd must pass it on, without close-on-exec", fd)
	case err != nil:
		return nil, fmt.Errorf("descriptor %d is not a socket (%w)", fd, err)
	case listening != 0:
		return vhostuser.ListenFD(fd, opts)
	}
	return vhostuser.NewConnected(fd, opts.Conn)
}

// activate takes the one socket that a service manager has passed.
func activate(opts vhostuser.ListenOptions) (source, error) {
	files := activation.Files(true)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if len(files) != 1 {
		return source{}, fmt.Errorf("the service manager passed %d sockets: want one, that of the VM", len(files))
	}
	fd, err := unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return source{}, fmt.Errorf("the service manager's socket: %w", err)
	}
	path := socketName(fd)
	a, err := inherit(fd, opts)
	return source{a, path, true}, err
}

// socketName is the path that a socket is bound to, "" for none.
func socketName(fd int) string {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return ""
	}
	if u, ok := sa.(*unix.SockaddrUnix); ok && len(u.Name) > 0 && u.Name[0] != '@' {
		return u.Name
	}
	return ""
}
